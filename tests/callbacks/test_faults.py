"""Nothing that goes wrong in a measurement kills or changes a run, and no NaN reaches ``callback_metrics``."""

import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from harness import GoesOn, Model, bits, changed_by, data, fit, mlp

from lsp_callbacks import (
    Monitor,
    Quantity,
    SGDStability,
    Sharpness,
    Snapshot,
    StabilityMonitor,
    StopOnInstability,
    Unmeasurable,
)
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.loops import Watch
from lsp_callbacks.monitor import gradient_check, observer, training_loop
from lsp_callbacks.step import pending_step
from lsp_callbacks.step.flat import displaced
from lsp_callbacks.step.probes import Probes
from lsp_callbacks.step.snapshot import computed_once

QUIET = pytest.mark.filterwarnings("ignore")


# -- NaN and Inf ---------------------------------------------------------------------------------------------------


class Poisoned(Model):
    """From the third step on, something is not finite."""

    def __init__(self, what, value):
        super().__init__(mlp(torch.nn.BatchNorm1d(5)))
        self.what, self.value = what, value

    def training_step(self, batch, batch_idx):
        x, y = batch
        bad = self.global_step >= 3
        if bad and self.what == "inputs":
            x = x * self.value
        loss = self.loss((x, y))
        return loss * self.value if bad and self.what == "loss" else loss

    def on_after_backward(self):
        if self.global_step >= 3 and self.what == "gradient":
            self.net[0].weight.grad.fill_(self.value)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 3 and self.what == "weights":
            self.net[0].weight.data[0, 0] = self.value


@QUIET
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient", "weights", "inputs"])
def test_numbers_that_are_not_finite(what, value):
    monitor = StabilityMonitor("full", every_n_steps=2, window=2)
    stop = GoesOn()
    assert not changed_by(lambda: Poisoned(what, value), monitor, stop=stop, max_steps=9)
    assert stop.stop_step == (4 if what == "gradient" else 3)  # the first loss that is not finite
    assert monitor.verdict.state == "not finite" and monitor.verdict.advice
    sharpness = monitor.history["stability/sharpness"]
    assert math.isfinite(sharpness.values[0]) and math.isnan(sharpness.values[-1])


@QUIET
def test_a_cadence_of_nan_readings_is_the_fixed_one():
    cadence, found = Monitor(Sharpness(), budget=0.1).cadence, []
    for step in range(250):
        if cadence.starting(step):
            cadence.read(math.nan), cadence.observed(step), cadence.priced({"sharpness": {"edge": 5.0}})
            cadence.started(step, cadence.starting(step))
            found.append(step)
    assert found[-4:] == [found[-4] + 50 * i for i in range(4)]


# -- memory --------------------------------------------------------------------------------------------------------


@computed_once
def replayed(snapshot):
    return snapshot.replay()


class Hungry(Quantity):
    """Runs out of memory with a graph in its hands, at the steps that it is told."""

    name, keys = "hungry", ("stability/hungry",)

    def __init__(self, error, steps=(2,)):
        super().__init__()
        self.error, self.steps, self.held = error, steps, []

    def cost(self, snapshot):
        return {"hungry": 1.0}

    def update(self, snapshot):
        self.complete = False
        if snapshot.step in self.steps:
            graph = replayed(snapshot)
            self.held.append(weakref.ref(graph))
            raise self.error("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.complete = True

    def compute(self):
        return {"stability/hungry": torch.tensor(1.0)}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_measurement_out_of_memory_is_nan_and_keeps_nothing(error):
    hungry = Hungry(error)
    after = []

    class Next(Hungry):
        name, keys = "next", ("stability/next",)

        def update(self, snapshot):  # at the same step: what was held is free again
            gc.collect() if hungry.held else None
            after.extend(ref() for ref in hungry.held)
            self.complete = True

        def compute(self):
            return {"stability/next": torch.tensor(1.0)}

    monitor = StabilityMonitor([hungry, Next(error), "sharpness"], every_n_steps=1)
    with pytest.warns(UserWarning, match=f"could not measure hungry at step 2; reporting NaN: {error.__name__}"):
        assert not changed_by(Model, monitor, max_steps=5)
    assert after and all(one is None for one in after)
    assert [math.isnan(v) for v in monitor.history["stability/hungry"].values] == [False, False, True, False, False]
    assert all(map(math.isfinite, monitor.history["stability/sharpness"].values))


@pytest.mark.parametrize(
    "owner, where",
    [(pending_step, "ModuleCopy"), (RandomState, "__init__"), (pending_step, "copied"), (pending_step, "fingerprint")],
)
def test_no_memory_for_the_copy(owner, where, monkeypatch):
    """Of the batch, the module, the random states: at every step but the first."""
    real, calls = getattr(owner, where), []

    def short(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monitor = StabilityMonitor("economy", every_n_steps=1)
    monkeypatch.setattr(owner, where, short)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        assert not changed_by(Model, monitor, max_steps=6)
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    assert math.isfinite(monitor.history["stability/sharpness"].values[0])


def test_no_memory_to_remember_the_gradient(monkeypatch):
    def short(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gradient_check, "identical", short)
    with pytest.warns(UserWarning, match="out of memory"):
        assert not changed_by(Model, StabilityMonitor("economy", every_n_steps=1), max_steps=4)


def test_a_failure_that_is_kept_holds_no_frames():
    """What the probes remember of why they cannot be used is raised at each measurement."""
    probes = Probes(4, None, None)
    probes.add("no tensor")
    held = probes._failure
    with pytest.raises(Unmeasurable, match="holds no tensor") as caught:
        pending = SimpleNamespace(module=torch.nn.Linear(1, 1), module_copy=None, micro_batches=1)
        probes.probe_set(pending, None).parts[0]()
    assert held is not None and held is not caught.value and held.__traceback__ is None


# -- the user's own exceptions -------------------------------------------------------------------------------------


class Raises(Model):
    """In a replay, or in the real step."""

    def __init__(self, where, error=RuntimeError):
        super().__init__()
        self.where, self.error = where, error

    def training_step(self, batch, batch_idx):
        replayed = type(self._trainer).__name__ == "MutedTrainer"
        if self.global_step == 3 and replayed == (self.where == "replay"):
            raise self.error("mine")
        return super().training_step(batch, batch_idx)


def test_an_exception_in_a_replay_is_nan_and_the_run_goes_on():
    monitor = StabilityMonitor("economy", every_n_steps=1)
    with pytest.warns(UserWarning, match="RuntimeError: mine") as caught:
        assert not changed_by(lambda: Raises("replay"), monitor, max_steps=6)
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    assert [math.isnan(v) for v in monitor.history["stability/sharpness"].values] == [0, 0, 0, 1, 0, 0]


@QUIET
def test_an_exception_in_the_real_step_passes_unchanged():
    for ours in ([], [StabilityMonitor(every_n_steps=1), StopOnInstability()]):
        with pytest.raises(RuntimeError) as caught:
            fit(lambda: Raises("step"), *ours, max_steps=6)
        assert caught.value.args == ("mine",) and caught.value.__context__ is None


@QUIET
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_replay_passes(error):
    monitor = StabilityMonitor("economy", every_n_steps=1)
    with pytest.raises(SystemExit if error is SystemExit else BaseException) as caught:
        fit(lambda: Raises("replay", error), monitor, max_steps=6)
    assert isinstance(caught.value, KeyboardInterrupt | SystemExit)


def test_an_interrupt_while_the_weights_are_displaced_puts_them_back():
    net = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt), displaced(list(net.parameters()), torch.ones(8), 0.1):
        assert not torch.equal(net.bias, before[1])
        raise KeyboardInterrupt
    assert all(map(torch.equal, net.parameters(), before))


def test_a_schedule_that_cannot_be_looked_ahead_is_no_obstacle():
    class Brittle(Model):
        def configure_optimizers(self):
            optimizer = self.optimizer(self.parameters())

            class NoCopy(torch.optim.lr_scheduler.ConstantLR):
                def __deepcopy__(self, memo):
                    raise IndexError("no rate")

            schedule = NoCopy(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    monitor = StabilityMonitor("economy", every_n_steps=2)
    with pytest.warns(UserWarning, match="IndexError: no rate") as caught:
        assert not changed_by(Brittle, monitor, max_steps=6, max_epochs=10)
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    assert all(map(math.isfinite, monitor.history["stability/sharpness"].values))


# -- checkpoints ---------------------------------------------------------------------------------------------------


def spoilt(state, how):
    """A checkpoint's state of the two callbacks, as some other release would have written it."""
    monitor = state["monitor"]
    if how == "version missing":
        del monitor["version"]
    elif how == "unknown quantity":
        monitor["quantities"] |= {"flux": {"value": torch.tensor(3.0), "_update_count": torch.tensor(2)}}
    elif how == "unknown state of a known quantity":
        monitor["quantities"]["sharpness"] |= {"skewness": torch.tensor(1.0)}
    elif how == "fewer quantities":
        monitor["quantities"].pop("sharpness")
    elif how == "newer version":
        monitor["version"] = 99
    elif how == "other shape":
        monitor["history"] = [1, 2, 3]
    elif how == "before the look-ahead":
        del state["critical"], state["stochastic"]


@pytest.mark.parametrize(
    "how, anew",
    [
        ("version missing", True), ("unknown quantity", False), ("unknown state of a known quantity", False),
        ("fewer quantities", False), ("newer version", True), ("other shape", True), ("before the look-ahead", False),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_release(how, anew, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    settings = {"max_steps": 15, "loader": data(shuffle=False)}
    fit(Model, StabilityMonitor("economy", every_n_steps=5), StopOnInstability(), Save(), **settings)
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    spoilt(checkpoint["callbacks"]["StabilityMonitor"], how)
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    monitor = StabilityMonitor("economy", every_n_steps=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Model, monitor, StopOnInstability(), ckpt_path=tmp_path / "cut.ckpt", **settings)
    said = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(said) == anew and all("begins anew" in text for text in said)
    steps = monitor.history["stability/sharpness"].steps
    assert steps == ([7, 12] if anew else [0, 5, 10])


def test_a_stop_rule_of_another_release_goes_on_with_what_is_there():
    stop = StopOnInstability()
    stop.load_state_dict({"events": [7], "flux": 3})
    assert stop.event_step == 7 and stop.state_dict()["losses"]["count"] == 0 and stop.stop_step is None


SCRIPT = """
    import os, signal, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import pytorch_lightning as pl, torch
    from harness import Model, data, fit
    from lsp_callbacks import StabilityMonitor, StopOnInstability
    from lsp_callbacks.step.flat import displaced

    torch.set_num_threads(1)
    folder, kill = sys.argv[1], int(sys.argv[2])
    monitor = StabilityMonitor("default", every_n_steps=4, window=2)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step % 6 == 0:
                trainer.save_checkpoint(f"{{folder}}/last.ckpt")

    sharpness = monitor.monitor.quantities["sharpness"]
    update = sharpness.update

    def deadly(snapshot):
        parameters = list(snapshot.parameters.values())
        if snapshot.step == kill:
            with displaced(parameters, torch.ones(sum(p.numel() for p in parameters)), 1.0):
                os.kill(os.getpid(), signal.SIGKILL)
        update(snapshot)

    sharpness.update = deadly
    start = f"{{folder}}/last.ckpt" if os.path.exists(f"{{folder}}/last.ckpt") else None
    run = fit(Model, monitor, StopOnInstability(), Save(), max_steps=20, loader=data(shuffle=False), ckpt_path=start)
    curves = {{key: (c.steps, c.values) for key, c in monitor.history.items() if key.count("/") == 1}}
    torch.save({{"weights": run.model.state_dict(), "curves": curves}}, f"{{folder}}/end.pt")
"""


def test_a_run_killed_in_the_middle_of_a_measurement_resumes(tmp_path):
    """SIGKILL with the weights displaced; the last checkpoint was written two steps before."""
    tests = Path(__file__).parents[1]
    script = textwrap.dedent(SCRIPT).format(tests=str(tests), root=str(tests.parent))
    (tmp_path / "run.py").write_text(script)
    ends = {}
    for name, kills in (("whole", [-1]), ("killed", [8, -1])):
        folder = tmp_path / name
        folder.mkdir()
        for kill in kills:
            command = [sys.executable, "-W", "ignore", str(tmp_path / "run.py"), str(folder), str(kill)]
            ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert ended.returncode == (0 if kill < 0 else -signal.SIGKILL), ended.stderr
            assert (folder / "last.ckpt").exists()
        ends[name] = torch.load(folder / "end.pt")
    assert bits(ends["whole"]["weights"]) == bits(ends["killed"]["weights"])
    whole, killed = (ends[name]["curves"] for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and whole["stability/sharpness"][0] == killed["stability/sharpness"][0]
    # A resumed run has lost its warm starts, and checks its next reading anew.
    rates, again = whole["stability/mean_square_lr"], killed["stability/mean_square_lr"]
    assert again[0] == rates[0] and again[1] == pytest.approx(rates[1], rel=1e-5)
    assert killed["stability/courant"] == killed["stability/courant_mean_square"]
    # The truth lies between each reading and its error bar, so the bar of the lower one reaches up to the other.
    low, high = sorted(
        (ends["stability/sharpness"][1][-1], ends["stability/sharpness_residual"][1][-1]) for ends in (whole, killed)
    )
    assert high[0] <= low[0] * (1 + min(low[1], 0.2)) + 1e-6 * low[0]


def test_the_state_survives_a_snapshot_of_a_failed_step():
    """A failure leaves a state that can be saved and read."""
    net = torch.nn.Linear(2, 1)
    monitor = Monitor(Hungry(MemoryError, steps=(0,)), every_n_steps=1)
    with pytest.warns(UserWarning, match="hungry"):
        monitor.observe(Snapshot(0, net, replay=lambda: net(torch.ones(2)).sum()))
    again = Monitor(Hungry(MemoryError), every_n_steps=1)
    again.load_state_dict(monitor.state_dict())
    assert again.cadence.state_dict() == monitor.cadence.state_dict()


# -- other loops, other optimizers, other batches -------------------------------------------------------------------


class NoRate(torch.optim.SGD):
    """As optimizers that find their rate themselves."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)
        return loss


@QUIET
def test_an_optimizer_without_a_rate():
    monitor = StabilityMonitor("economy", every_n_steps=2)
    assert not changed_by(lambda: Model(optimizer=NoRate), monitor, max_steps=5)
    assert len(monitor.history["stability/spectral_norm_max"].steps) == 3


def test_a_replay_that_fails_is_not_free():
    """Otherwise it would be tried at every step."""
    net, calls = torch.nn.Linear(1, 1), []

    def replay():
        calls.append(1)
        raise AttributeError("mine")

    monitor = Monitor(Sharpness(), budget=0.1)
    with pytest.warns(UserWarning, match="mine"):
        for number in range(100):
            known = {
                "loss": torch.ones(()),
                "gradient": {name: torch.ones_like(p) for name, p in net.named_parameters()},
            }
            monitor.observe(Snapshot(number, net, replay, torch.optim.SGD(net.parameters(), lr=0.1), **known))
    assert 5 <= len(monitor.history["stability/sharpness"].steps) <= 16


@QUIET
def test_batches_that_cannot_be_joined():
    class Sparse(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1]), batch_idx)

    def loader():
        x, y = data().dataset.tensors
        batches = [(x[k : k + 8], y[k : k + 8], torch.eye(8).to_sparse()) for k in range(0, 40, 8)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    monitor = StabilityMonitor(["spectral_norm", "sharpness", SGDStability(16)], every_n_steps=2)
    assert not changed_by(Sparse, monitor, loader=loader, max_steps=5)
    assert len(monitor.history["stability/spectral_norm_max"].steps) == 3


@pytest.mark.parametrize(
    "owner, where",
    [
        (pending_step, "ModuleCopy"),
        (pending_step, "copied"),
        (pending_step, "fingerprint"),
        (training_loop, "PendingStep"),
        (observer, "verified"),
    ],
)
def test_no_memory_in_a_plain_loop(owner, where, monkeypatch):
    net, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, where, short)
    watch = Watch(net, sgd, lambda module, batch: module(batch).square().mean(), Monitor(Sharpness(), every_n_steps=1))
    with pytest.warns(UserWarning, match="out of memory"):
        for batch in watch([x] * 3):
            sgd.zero_grad(), net(batch).square().mean().backward(), sgd.step()
    assert all(math.isnan(v) for curve in watch.history.values() for v in curve.values) and watch.step == 3


def test_a_log_of_the_users_that_fails_is_the_users_own():
    net, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)

    def log(values, number):
        raise KeyError("mine")

    loss_fn = lambda module, batch: module(batch).square().mean()  # noqa: E731
    watch = Watch(net, sgd, loss_fn, Monitor(Sharpness(), every_n_steps=1), log=log)
    with pytest.raises(KeyError, match="mine"):
        for batch in watch([x]):
            sgd.zero_grad(), loss_fn(net, batch).backward(), sgd.step()


def test_a_sub_batch_is_shortened_as_the_step_is():
    """By the norm of the whole gradient: the Courant number under clipping is the unclipped one times the factor."""
    found = {}
    for limit in (None, 0.05):
        monitor = StabilityMonitor(["sharpness"], every_n_steps=1, sub_batch=4)
        norms = Norms()
        with pytest.warns(UserWarning, match="sub_batch=4"):
            fit(Model, monitor, norms, max_steps=1, gradient_clip_val=limit)
        found[limit] = monitor.history["stability/courant_gd"].values[0]
    assert found[0.05] == pytest.approx(found[None] * 0.05 / norms.norm, rel=1e-3)


class Norms(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norm = float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]))
