"""Training returns to a state that was measured stable, to the last bit, and goes on at a lower rate."""

import json
import logging
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from harness import BATCH, CLASSES, FEATURES, MOMENTUM, Model, Rows, mlp, same, trainer
from launch_ranks import launched
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lsp_callbacks import CapLearningRate, RollBackOnInstability, StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.base import Callback

slow = pytest.mark.slow
ROLL, SCALE = "stability/roll_back", "stability/lr_scale"


class Noisy(Model):
    """Dropout, momentum, a schedule, and random numbers of three kinds; it breaks once, at a step that is told."""

    def __init__(self, breaks=(), by=math.nan, decay=0.99):
        super().__init__(mlp(nn.Dropout(0.3)), MOMENTUM)
        self.breaks, self.by, self.decay = list(breaks), by, decay

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.breaks and self.global_step == self.breaks[0] and not getattr(self.trainer, "is_replaying", False):
            loss = loss * self.by
        return loss * (1 + 0.01 * random.random() + 0.01 * np.random.rand())

    def on_train_batch_end(self, *args):
        if self.breaks and self.trainer.global_step > self.breaks[0]:
            self.breaks.pop(0)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [{"scheduler": lr_scheduler.ExponentialLR(optimizer, self.decay), "interval": "step"}]


def batches(n=80, shuffle=True, **settings):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), batch_size=BATCH, shuffle=shuffle, **settings)


class Seen(Callback):
    """Every batch that was trained with, by step, and the whole state after it."""

    def __init__(self):
        self.batches, self.states, self.rates = [], {}, []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(
            lambda o, *_: self.rates.append((trainer.global_step, o.param_groups[0]["lr"]))
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.global_step, batch[0].clone()))
        self.states.setdefault(trainer.global_step, []).append({
            "weights": {k: v.clone() for k, v in pl_module.state_dict().items()},
            "optimizer": json.dumps(
                [g["lr"] for g in trainer.optimizers[0].param_groups]
                + [s["momentum_buffer"].tolist() for s in trainer.optimizers[0].state.values()]
            ),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "rng": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
            "progress": (trainer.current_epoch, batch_idx),
        })  # fmt: skip


def run(folder, make, *callbacks, loader=None, valid=None, every=2, states=4, ckpt_path=None, seed=0, **settings):
    """Trains with returns; the callback is the last one."""
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    own = {k: settings.pop(k) for k in ("times", "factor", "skip_batches", "safety") if k in settings}
    back = RollBackOnInstability(dirpath=str(folder), every_n_steps=states, **own)
    measuring = StabilityMonitor(["sharpness"], every_n_steps=every)
    t = trainer(measuring, *callbacks, back, **{"max_steps": 40} | settings)
    back.fit(t, make(), batches() if loader is None else loader, valid, ckpt_path=ckpt_path)
    return back, t


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at, state, settings", [
    (17, 15, {}),  # within the second of epochs of ten batches
    pytest.param(23, 20, {"every": 1}, marks=slow),  # at the end of an epoch
    pytest.param(19, 15, {"valid": batches(shuffle=False), "val_check_interval": 4}, marks=slow),  # between validations
    pytest.param(24, 21, {"valid": batches(shuffle=False), "states": 1}, marks=slow),  # after one at an epoch's end
    pytest.param(23, 20, {"every": 1, "accumulate_grad_batches": 2}, marks=slow),
])  # fmt: skip
def test_it_returns_to_the_last_bit_and_goes_on_as_if_nothing_had_been(tmp_path, at, state, settings):
    plain, broken = Seen(), Seen()
    run(tmp_path / "a", Noisy, plain, **settings)
    back, t = run(tmp_path / "b", partial(Noisy, [at]), broken, factor=1.0, safety=1e9, **settings)
    (roll_back,) = back.roll_backs
    assert t.global_step == 40 and roll_back.at == at + 1 and roll_back.state.step == state
    assert "loss is nan" in roll_back.reason and roll_back.scale == 1
    for step in range(1, 41):
        assert same(plain.states[step][-1], broken.states[step][-1]), step
        if roll_back.state.step < step <= at:
            assert len(broken.states[step]) == 2 * len(plain.states[step])
    trained, wanted = dict(broken.batches), dict(plain.batches)
    assert trained.keys() == wanted.keys() and all(torch.equal(trained[step], wanted[step]) for step in wanted)


@slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", [
    partial(batches, n=BATCH),  # an epoch is a batch: states lie between epochs
    partial(batches, num_workers=2),
    partial(batches, shuffle=False),
    lambda: DataLoader(Endless(), batch_size=BATCH),
])  # fmt: skip
def test_the_same_batches_come_again_from_every_loader(tmp_path, loader):
    plain, broken = Seen(), Seen()
    run(tmp_path / "a", Noisy, plain, loader=loader(), max_steps=26)
    back, _ = run(tmp_path / "b", partial(Noisy, [15]), broken, loader=loader(), factor=1.0, max_steps=26)
    assert len(back.roll_backs) == 1 and back.roll_backs[0].state.step >= 8
    assert all(same(plain.states[step][0], broken.states[step][-1]) for step in range(1, 27))


class Endless(IterableDataset):
    def __iter__(self):
        for k in range(10**6):
            x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(k))
            yield x, x[:CLASSES].argmax()


@slow
def test_a_loader_of_another_order_is_told(tmp_path):
    class Unrepeatable(Noisy):
        def train_dataloader(self):
            return batches(generator=torch.Generator().manual_seed(torch.seed() % 2**31))

    torch.manual_seed(0)
    back = RollBackOnInstability(dirpath=str(tmp_path), every_n_steps=4)
    t = trainer(StabilityMonitor(["sharpness"], every_n_steps=2), back, max_steps=20)
    with pytest.warns(UserWarning, match="does not give the batches of this epoch in the same order"):
        back.fit(t, Unrepeatable([15]))
    assert len(back.roll_backs) == 1 and t.global_step == 20


# -- the rate --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_rate_is_lower_in_the_updates_alone_and_that_is_measured(tmp_path):
    plain, broken, rows = Seen(), Seen(), Rows()
    run(tmp_path / "a", Noisy, plain)
    back, t = run(tmp_path / "b", partial(Noisy, [17]), broken, logger=rows, factor=0.25)
    (roll_back,) = back.roll_backs
    returned = len(plain.rates[: roll_back.at])
    scheduled = [rate for _, rate in plain.rates]
    assert broken.rates[:returned] == plain.rates[:returned]
    again = [rate for _, rate in broken.rates[returned:]]
    assert again == pytest.approx([0.25 * rate for rate in scheduled[roll_back.state.step :]], rel=1e-12)
    assert same(plain.states[40][0]["scheduler"], broken.states[40][-1]["scheduler"])
    assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.99**40)
    assert rows.curve(ROLL) == {17: roll_back.state.step} and rows.curve(SCALE) == {17: 0.25}
    # The sharpness times the rate over two, at the rate that was used.
    monitor = next(c for c in t.callbacks if isinstance(c, StabilityMonitor))
    for step in (36, 38):
        measured = dict(zip(*vars(monitor.history["stability/sharpness"]).values()))[step]
        courant = dict(zip(*vars(monitor.history["stability/courant_gd"]).values()))[step]
        assert courant == pytest.approx(measured * 0.25 * scheduled[step] / (2 * 1.9), rel=1e-3)


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_rate_beyond_the_edge_comes_down_below_the_critical_one_of_the_state(tmp_path):
    class Jumps(Noisy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            jump = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 21 else 3000.0)
            return [optimizer], [{"scheduler": jump, "interval": "step"}]

    seen = Seen()
    seen.on_train_batch_end = lambda *args: None
    back, t = run(tmp_path, Jumps, seen, max_steps=60)
    (roll_back,) = back.roll_backs
    assert "is" in roll_back.reason and roll_back.at == 21
    assert roll_back.scale * 150 == pytest.approx(0.9 * roll_back.state.critical)
    assert t.global_step == 60 and max(rate for _, rate in seen.rates) < 1.01 * 0.9 * roll_back.state.critical


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_cap_beside_it_limits_the_lowered_rate(tmp_path):
    seen = Seen()
    back, t = run(tmp_path, partial(Noisy, [17]), seen, CapLearningRate(1e-6), factor=0.25)
    cap = next(c for c in t.callbacks if isinstance(c, CapLearningRate))
    assert len(back.roll_backs) == 1 and cap.capped > 20
    limits = [rate for _, rate in seen.rates[25:]]
    assert max(limits) < 1e-3 and t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.99**40)
    back, t = run(tmp_path, partial(Noisy, [17]), seen := Seen(), CapLearningRate(1e6), factor=0.25)
    assert seen.rates[-1][1] == pytest.approx(0.25 * 0.05 * 0.99**39)


# -- how often, and past what ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_after_so_many_returns_it_stops(tmp_path, caplog):
    class Always(Noisy):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            assert self.calls < 200, "it returns for ever"
            return super().training_step(batch, batch_idx) * (math.nan if self.global_step == 17 else 1.0)

    rows = Rows()
    with caplog.at_level(logging.INFO):
        back, t = run(tmp_path, Always, logger=rows, times=2)
    assert [each.at for each in back.roll_backs] == [18, 18] and t.global_step == 18
    assert [each.scale for each in back.roll_backs] == [0.5, 0.25]
    assert back.stop_step == 17 and rows.curve("stability/stop") == {17: 17}
    assert "return 2 of 2" in caplog.text and "stop at step 17: the loss is nan" in caplog.text
    assert len([*tmp_path.glob("*.ckpt")]) <= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "bad", [pytest.param(3, marks=slow), 16, pytest.param(24, marks=slow)]
)  # in the first epoch, later, after an epoch's beginning
def test_past_the_batches_at_which_it_broke(tmp_path, bad):
    """The batch is bad, not the step: without leaving it out training breaks there again."""
    data = batches(n=80, shuffle=False)

    class Corrupted(Noisy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            is_bad = self.trainer.current_epoch == bad // 10 and torch.equal(batch[0], data.dataset[rows][0])
            return loss * (math.nan if is_bad else 1.0)

    rows = slice(BATCH * (bad % 10), BATCH * (bad % 10 + 1))
    back, t = run(tmp_path, Corrupted, loader=batches(shuffle=False), skip_batches=True)
    (roll_back,) = back.roll_backs
    epoch, first, last = roll_back.skipped
    assert (epoch, last) == (bad // 10, bad % 10 + 1) and last - 4 <= first < last
    assert t.global_step == 40 and all(p.isfinite().all() for p in t.model.parameters())
    back, t = run(tmp_path / "again", Corrupted, loader=batches(shuffle=False))
    assert len(back.roll_backs) == 3 and back.stop_step is not None


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_breaks_at_once_begins_anew(tmp_path):
    plain, broken = Seen(), Seen()
    logs = [Rows(), Rows()]
    run(tmp_path / "a", Noisy, plain, logger=logs[0], log_every_n_steps=1)
    back, t = run(tmp_path / "b", partial(Noisy, [0]), broken, logger=logs[1], factor=1.0, log_every_n_steps=1)
    assert back.roll_backs[0].state.step == 0 and t.global_step == 40
    assert all(same(plain.states[step][0], broken.states[step][-1]) for step in range(1, 41))
    again = {step: v for step, v in logs[1].curve("loss").items()}
    assert again == logs[0].curve("loss")


# -- killed, and resumed ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody catches it."""


class Kills(Callback):
    """Ends the process, as it were, in a hook, the second time; saves checkpoints of the user's own."""

    def __init__(self, folder, hook, step=0):
        self.folder, self.fits, self.step = folder, 0, step
        setattr(self, hook, self.kill)

    def setup(self, trainer, pl_module, stage):
        self.fits += 1

    def kill(self, trainer, *args):
        if self.fits == 2 and trainer.global_step >= self.step:
            raise Killed

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "hook, step",
    [
        pytest.param("on_fit_start", 0, marks=slow),
        ("on_train_start", 0),
        pytest.param("on_train_batch_start", 15, marks=slow),
        pytest.param("on_before_zero_grad", 30, marks=slow),
    ],
)
def test_killed_in_the_middle_of_a_return_and_resumed_nothing_is_lost(tmp_path, hook, step):
    whole = Seen()
    back, _ = run(tmp_path / "a", partial(Noisy, [17]), whole, factor=0.25)
    with pytest.raises(Killed):
        run(tmp_path / "c", partial(Noisy, [17]), Kills(tmp_path, hook, step), factor=0.25)
    rest = Seen()
    again, t = run(tmp_path / "elsewhere", Noisy, rest, factor=0.25, ckpt_path=tmp_path / "last.ckpt", seed=5)
    assert [(each.at, each.scale) for each in again.roll_backs] == [(18, 0.25)] and again.scale == 0.25
    assert again._folder == str(tmp_path / "c") and t.global_step == 40
    if step == 0:  # the way that was left is left again; later, Lightning's own resuming knows no order of batches
        assert rest.batches[0][0] == back.roll_backs[0].state.step + 1
        assert all(same(whole.states[s][-1], rest.states[s][-1]) for s in rest.states)
    else:
        assert rest.batches[0][0] == step + 1 and rest.rates[0][1] == pytest.approx(0.25 * 0.05 * 0.99**step)


@slow
@pytest.mark.filterwarnings("ignore")
def test_resumed_from_before_a_return_it_goes_on_from_there(tmp_path):
    class Early(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    run(tmp_path / "a", partial(Noisy, [17]), Early())
    seen = Seen()
    back, t = run(tmp_path / "a", Noisy, seen, ckpt_path=tmp_path / "early.ckpt")
    assert not back.roll_backs and back.scale == 1 and seen.batches[0][0] == 6 and t.global_step == 40


# -- what cannot be right --------------------------------------------------------------------------------------------


def test_refused_where_it_cannot_work(tmp_path):
    back = RollBackOnInstability(dirpath=str(tmp_path))
    with pytest.raises(ValueError, match="instead of trainer"):
        trainer(StabilityMonitor(), back).fit(Model(), batches())
    with pytest.raises(ValueError, match="takes the place of StopOnInstability"):
        back.fit(trainer(StabilityMonitor(), StopOnInstability(), back), Model(), batches())
    with pytest.raises(ValueError, match="does not have this callback"):
        back.fit(trainer(StabilityMonitor()), Model(), batches())
    with pytest.raises(ValueError, match="needs a StabilityMonitor"):
        back.fit(trainer(back), Model(), batches())


@pytest.mark.parametrize("settings", [{"times": 0}, {"factor": 0}, {"factor": 2}, {"safety": 0}, {"every_n_steps": 0}])
def test_bad_arguments(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RollBackOnInstability(**settings)


# -- several processes -------------------------------------------------------------------------------------------------


@slow
def test_two_processes_return_together_each_to_its_own_random_numbers_and_batches(tmp_path):
    ranks = launched("roll_back_ranks", tmp_path)
    for rank in ranks:
        (roll_back,) = rank["broken"]["roll_backs"]
        assert roll_back == ranks[0]["broken"]["roll_backs"][0] and roll_back.state.step > 0 and roll_back.at >= 17
        for step in range(1, 41):
            assert same(rank["plain"]["states"][step][-1], rank["broken"]["states"][step][-1]), step
        trained = dict(rank["broken"]["batches"])
        assert all(torch.equal(trained[step], batch) for step, batch in rank["plain"]["batches"])
    (a, b) = (rank["broken"]["states"][40][-1]["rng"][0] for rank in ranks)
    assert not torch.equal(a, b)
