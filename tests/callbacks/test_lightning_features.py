"""Lightning's own features beside ours: their trial steps are not measured, and the run is measured as it is."""

import copy
import math
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from harness import MOMENTUM, Losses, Model, Rows, data, finite, fit, mlp, trainer, with_and_without
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.callbacks import StochasticWeightAveraging as SWA
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lsp_callbacks import StabilityMonitor, StopOnInstability

SHARPNESS, LYAPUNOV = "stability/sharpness", "stability/lyapunov"


def ours(**settings):
    return StabilityMonitor(["sharpness", "lyapunov", "spectral_norm"], every_n_steps=1, window=1, **settings)


class Tunable(Model):
    """Has what the finders set."""

    def __init__(self):
        super().__init__(mlp(nn.Dropout(0.2)))
        self.lr, self.batch_size = 0.1, 4

    def train_dataloader(self):
        return data(batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


FINDERS = {
    "rate": lambda: LearningRateFinder(num_training_steps=12, min_lr=1e-3, max_lr=0.1),
    "batch size": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=4),
}


@pytest.mark.parametrize("name", FINDERS)
@pytest.mark.parametrize("first", [True, False])
def test_the_trials_of_finders_are_not_measured(name, first, tmp_path):
    left = []
    for with_us in (False, True):
        finder, monitor, losses = FINDERS[name](), ours(strict=True), Losses()
        callbacks = [monitor, StopOnInstability(threshold=math.inf)] if with_us else []
        callbacks = [*callbacks, finder] if first else [finder, *callbacks]
        torch.manual_seed(0)
        model = Tunable()
        run = trainer(*callbacks, losses, default_root_dir=tmp_path, max_steps=8)
        run.fit(model)
        left.append((losses.losses, [p.tolist() for p in model.parameters()], model.lr, model.batch_size))
    assert left[0] == left[1]
    assert monitor.history[SHARPNESS].steps == [*range(8)] and monitor.step == 8
    assert finite(monitor, SHARPNESS) and finite(monitor, LYAPUNOV)


@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_the_tuner_before_the_run(what, tmp_path):
    monitor, losses = ours(strict=True), Losses()
    torch.manual_seed(0)
    model, run = Tunable(), trainer(monitor, losses, default_root_dir=tmp_path, max_steps=6)
    settings = {"num_training": 12, "min_lr": 1e-3} if what == "lr_find" else {"max_trials": 2, "steps_per_trial": 2}
    getattr(Tuner(run), what)(model, **settings)
    assert not monitor.history and monitor.step == 0
    run.fit(model)
    assert monitor.history[SHARPNESS].steps == [*range(6)] and finite(monitor, SHARPNESS)


class HandWritten(pl.Callback):
    """A moving average of the weights."""

    def on_train_start(self, trainer, pl_module):
        self.average = copy.deepcopy(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        for p, q in zip(self.average.parameters(), pl_module.parameters()):
            p.data.lerp_(q.data, 0.1)


AVERAGES = {
    "swa": lambda: SWA(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
    "by hand": HandWritten,
}
if hasattr(pl.callbacks, "EMAWeightAveraging"):  # Lightning 2.6
    AVERAGES["ema"] = lambda: pl.callbacks.EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(5)], ids=["plain", "batch norm"])
def test_averages_of_the_weights_beside_us(name, norm):
    """With batch norm, weight averaging adds an epoch without steps."""
    left = []
    for callbacks in ([], [ours(strict=True), StopOnInstability(threshold=math.inf)]):
        losses, average = Losses(), AVERAGES[name]()
        settings = {"max_epochs": 3, "max_steps": -1}
        run = fit(lambda: Model(mlp(norm()), MOMENTUM), *callbacks, average, losses, **settings)
        left.append((losses.losses, [t.tolist() for t in run.model.state_dict().values()]))
    assert left[0] == left[1]
    assert callbacks[0].history[SHARPNESS].steps == [*range(18)]
    assert finite(callbacks[0], SHARPNESS) and finite(callbacks[0], LYAPUNOV)


def test_no_batch_is_kept_in_the_epoch_that_weight_averaging_adds():
    class Kept(pl.Callback):
        epochs = ()

        def on_train_batch_end(self, trainer, *args):
            if monitor.observer.is_pending:
                self.epochs = (*self.epochs, trainer.current_epoch)

    monitor, kept = ours(), Kept()
    run = fit(lambda: Model(mlp(nn.BatchNorm1d(5))), monitor, AVERAGES["swa"](), kept, max_epochs=3, max_steps=-1)
    assert kept.epochs == () and monitor.step == run.global_step == 19 and monitor.history[SHARPNESS].steps[-1] < 18


class Scheduled(Model):
    def __init__(self, make, interval):
        super().__init__(mlp())
        self.make, self.interval = make, interval

    def configure_optimizers(self):
        optimizer = MOMENTUM(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "interval": self.interval}}


@pytest.mark.parametrize(
    "make, interval",
    [(lambda o: OneCycleLR(o, 0.3, total_steps=40), "step"), (lambda o: StepLR(o, 1, 0.5), "epoch")],
    ids=["one cycle", "by epochs"],
)
def test_the_rate_and_momentum_of_the_step_itself_are_used(make, interval):
    """``courant_gd = lr lambda / (2 + 2 beta)``, with what the group held when the step was taken."""

    class Used(pl.Callback):
        def __init__(self):
            self.groups = []

        def on_train_batch_start(self, trainer, *args):
            self.groups.append({key: trainer.optimizers[0].param_groups[0][key] for key in ("lr", "momentum")})

    used, monitor = Used(), ours(strict=True)
    fit(lambda: Scheduled(make, interval), monitor, used, max_epochs=3, max_steps=-1)
    history = monitor.history
    assert len({group["lr"] for group in used.groups}) > 1
    for group, sharpness, courant in zip(
        used.groups, history[SHARPNESS].values, history["stability/courant_gd"].values
    ):
        assert courant == pytest.approx(group["lr"] * sharpness / (2 + 2 * group["momentum"]), rel=1e-5)


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"limit_train_batches": 2, "max_epochs": 3}, 6),
        ({"limit_train_batches": 0.5, "max_epochs": 2}, 6),
        ({"overfit_batches": 1, "max_epochs": 4}, 4),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
    ],
)
def test_short_runs(settings, steps):
    monitor = with_and_without(lambda: Model(mlp(nn.Dropout(0.1))), **{"max_steps": -1} | settings)
    assert monitor.step == steps and monitor.history[SHARPNESS].steps == [*range(0, steps, 2)]


def test_a_run_that_its_time_ends():
    class Slow(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                timer = next(c for c in self.trainer.callbacks if type(c).__name__ == "Timer")
                timer._duration = 0.0

    monitor = ours(strict=True)
    fit(Slow, monitor, max_time=timedelta(hours=1), max_epochs=5, max_steps=-1)
    assert 4 <= monitor.step < 30 and monitor.history[SHARPNESS].steps == [*range(monitor.step)]


class Overflows(Model):
    """Some gradients are infinite; the loss is not."""

    def __init__(self, at):
        super().__init__(mlp(nn.Dropout(0.1)))
        self.at = at

    def on_after_backward(self):
        if self.trainer.fit_loop.epoch_loop.batch_idx in self.at:
            self.net[0].weight.grad[0, 0] = math.inf


def test_a_gradient_scaler_that_is_disabled_is_none():
    monitor = ours(strict=True)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", enabled=False))
    fit(Model, monitor, plugins=[plugin])
    assert finite(monitor, SHARPNESS) and finite(monitor, LYAPUNOV)


@pytest.mark.parametrize("accumulate, steps", [(1, (0, 2, 3, 5)), (2, (1,))])
def test_steps_that_a_gradient_scaler_leaves_out_are_counted_but_not_measured(accumulate, steps):
    left = []
    for with_us in (False, True):
        rows, losses, monitor = Rows(), Losses(), ours(strict=True)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**6))
        settings = {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": accumulate, "plugins": [plugin]}
        run = fit(lambda: Overflows((1, 4)), *[monitor] * with_us, losses, logger=rows, **settings)
        left.append((losses.losses, [p.tolist() for p in run.model.parameters()], plugin.scaler.get_scale()))
    assert left[0] == left[1] and left[1][2] < 2.0**6
    assert monitor.step == run.global_step == 18 // accumulate
    in_epoch = 6 // accumulate
    assert monitor.history[SHARPNESS].steps == [in_epoch * epoch + step for epoch in range(3) for step in steps]
    # Nothing has moved in between: the windows go on.
    assert finite(monitor, SHARPNESS) and finite(monitor, LYAPUNOV)
