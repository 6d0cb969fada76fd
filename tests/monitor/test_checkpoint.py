"""Saving changes nothing of the run that goes on, and a run that is resumed measures the same numbers."""

import warnings

import pytest
import torch
from checkpoint_harness import Once, Repeatable, curves, stream
from harness import FEATURES, Model, Rows, fit, trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import LyapunovTrajectory, SGDStability, StabilityMonitor, StopOnInstability

KEY = "stability/courant"


def monitors(**settings):
    trajectory = LyapunovTrajectory(transient=0, window=40)
    quantities = ["spectral_norm", "sharpness", "lyapunov", trajectory]
    return StabilityMonitor(quantities, every_n_steps=5, window=3, **settings), StopOnInstability(threshold=1e9)


def kinds(monitor):
    """What the dial is, and how often it was read."""
    return monitor.courant_source, set(monitor.history["stability/courant_source"].values)


@pytest.mark.parametrize("cut, vectors, order", [(1, False, 1), (12, False, 1), (15, False, -1), (12, True, 1)])
def test_saving_changes_nothing(cut, vectors, order, tmp_path):
    """Right after an alignment, inside windows and between them; while probes are collected; before and after ours."""
    settings = {"loader": stream(), "max_steps": 24}

    def both():
        return StabilityMonitor(["lyapunov", "sharpness", SGDStability(10)], every_n_steps=5, save_vectors=vectors)

    plain, saved = ([both(), StopOnInstability()] for _ in range(2))
    fit(Repeatable, *plain, **settings)
    once = Once(tmp_path, cut), Once(tmp_path, cut + 1)
    fit(Repeatable, *[*saved, *once][::order], **settings)
    assert all(path.path.exists() for path in once)
    assert plain[0].history == saved[0].history and plain[1].state_dict() == saved[1].state_dict()
    assert len(plain[0].history["stability/courant"].steps) >= 5 and plain[0].courant_source == "courant_sgd"


def test_a_resumed_run_measures_the_same_kind_of_numbers(tmp_path):
    """Windows begin anew, from cold starts; probes are other samples; the headline number stays what it was."""
    settings = {"max_steps": 60}
    whole, second = (
        StabilityMonitor(["lyapunov", "sharpness", SGDStability(16)], every_n_steps=5, window=3) for _ in range(2)
    )
    once = Once(tmp_path, 12)
    fit(Repeatable, whole, once, loader=stream(), **settings)
    fit(Repeatable, second, loader=stream(12), ckpt_path=once.path, seed=9, **settings)
    before, after = (dict(zip(m.history[KEY].steps, m.history[KEY].values)) for m in (whole, second))
    assert {step: value for step, value in after.items() if step < 12} == {s: v for s, v in before.items() if s < 12}
    assert kinds(whole) == kinds(second) == ("courant_sgd", {1.0})
    assert list(after) == list(before)  # the step after its four batches is in time
    assert all(run.history[KEY] == run.history["stability/courant_sgd"] for run in (whole, second))
    later = [step for step in before if step >= 12]
    assert all(after[step] != before[step] and 1 / 4 < after[step] / before[step] < 4 for step in later)
    # The window from step 10 on is cut, and begins anew at once.
    assert whole.history["stability/lyapunov"].steps[:4] == [3, 7, 12, 17]  # there is no momentum at step 0
    assert second.history["stability/lyapunov"].steps[:4] == [3, 7, 14, 17]
    sharpness = [dict(zip(*vars(m.history["stability/sharpness"]).values())) for m in (whole, second)]
    assert [sharpness[1][step] for step in range(20, 60, 5)] == pytest.approx(
        [sharpness[0][step] for step in range(20, 60, 5)], rel=0.1
    )


@pytest.mark.parametrize("cut", [12, 43])
def test_with_its_vectors_a_resumed_run_measures_the_same(cut, tmp_path):
    """Cut inside windows and between them."""
    settings = {"max_steps": 50, "log_every_n_steps": 1}
    rows, resumed, once = Rows(), Rows(), Once(tmp_path, cut)
    whole, second = monitors(save_vectors=True), monitors(save_vectors=True)
    fit(Repeatable, *whole, once, loader=stream(), logger=rows, **settings)
    fit(Repeatable, *second, loader=stream(cut), logger=resumed, ckpt_path=once.path, seed=9, **settings)

    expected, got = curves(rows, cut), curves(resumed, cut)
    assert {key: list(curve) for key, curve in expected.items()} == {key: list(curve) for key, curve in got.items()}
    for key, curve in got.items():
        assert list(curve.values()) == pytest.approx(list(expected[key].values()), rel=1e-6), key
    for key, curve in whole[0].history.items():  # the whole history, from both parts
        if key.count("/") == 1:
            assert second[0].history[key].steps == curve.steps, key
            assert second[0].history[key].values == pytest.approx(curve.values, rel=1e-6, nan_ok=True), key
    assert whole[1].state_dict() == second[1].state_dict()


class Wide(Model):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 1400), nn.Tanh(), nn.Linear(1400, 1400), nn.Linear(1400, 3)))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def size_of_ours(path):
    checkpoint = torch.load(path, weights_only=True)
    ours = {k: v for k, v in checkpoint["callbacks"].items() if k.startswith("Stab") or k.startswith("Stop")}
    assert len(ours) == 2
    torch.save(ours, path)
    return path.stat().st_size


def test_a_checkpoint_is_small_and_loads_as_weights(tmp_path):
    monitor, once = StabilityMonitor(every_n_steps=5, window=2), Once(tmp_path, 2)
    run = fit(Wide, monitor, StopOnInstability(), once, max_steps=3)
    assert sum(p.numel() for p in run.model.parameters()) > 1.9e6
    again = StabilityMonitor()
    again.load_state_dict(torch.load(once.path, weights_only=True)["callbacks"]["StabilityMonitor"])
    assert again.step == 2 and again.history["stability/courant_gd"].steps == [0]
    assert size_of_ours(once.path) < 1.5e4
    for curve in monitor.history.values():  # and after a long run
        curve.steps, curve.values = [*range(50_000)], [0.5] * 50_000
    run.save_checkpoint(once.path)
    assert size_of_ours(once.path) < 1e6


def test_stock_callbacks_find_their_key_after_a_resume(tmp_path):
    key = "stability/courant_gd"
    once = Once(tmp_path, 3)
    fit(Repeatable, StabilityMonitor(every_n_steps=50), once, loader=stream(), max_steps=3)
    stop, save = EarlyStopping(key, check_on_train_epoch_end=True), ModelCheckpoint(tmp_path, monitor=key)
    monitor = StabilityMonitor(every_n_steps=50)
    run = fit(
        Repeatable, stop, save, monitor, loader=stream(), ckpt_path=once.path, enable_checkpointing=True,
        max_epochs=1, max_steps=-1, limit_train_batches=10,
    )  # fmt: skip
    assert monitor.history[key].steps == [0] and stop.best_score == pytest.approx(monitor.history[key].values[0])
    last = max(curve.steps[-1] for curve in monitor.history.values())  # the exponent's first window ends at step 1
    assert last <= 1 and run.callback_metrics["stability/age"] == run.global_step - 1 - last


def test_a_checkpoint_without_the_callbacks_is_no_obstacle(tmp_path):
    once = Once(tmp_path, 3)
    fit(Repeatable, once, loader=stream(), max_steps=3)
    monitor = StabilityMonitor(every_n_steps=5, window=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Repeatable, monitor, StopOnInstability(), loader=stream(3), ckpt_path=once.path, max_steps=10)
    assert monitor.history["stability/courant_gd"].steps == [3, 8]


def test_a_trainer_without_fit_can_save(tmp_path):
    run = trainer(StabilityMonitor(), StopOnInstability())
    run.strategy.connect(Repeatable())
    run.save_checkpoint(tmp_path / "early.ckpt")
    assert size_of_ours(tmp_path / "early.ckpt") < 1e4
