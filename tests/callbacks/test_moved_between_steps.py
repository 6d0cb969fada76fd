"""Weights that are moved between two steps, outside of the optimizer: at every step, or once."""

import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from harness import MOMENTUM, Model, data, fit, mlp
from loop_harness import cross_entropy

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.loops import Watch
from lsp_callbacks.monitor.between_steps import MOVED_BETWEEN
from lsp_callbacks.monitor.configure import configured

COURANT = "stability/courant"


@torch.no_grad()
def shrink(module):
    for p in module.parameters():
        p.mul_(0.99)


def clip_data(module):
    for p in module.parameters():
        p.data.clamp_(-0.2, 0.2)  # leaves no mark on the version


def tie(module):
    module.net[0].weight.data[0] = module.net[0].weight.data[1]


class Ending(pl.Callback):
    """Moves the weights at the end of some steps, or epochs."""

    def __init__(self, move, steps=lambda step: True, epochs=lambda epoch: False):
        self.move, self.steps, self.epochs = move, steps, epochs

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.steps(trainer.global_step):
            self.move(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.epochs(trainer.current_epoch):
            self.move(pl_module)


class Averaged(pl.Callback):
    """Validates with another set of weights, and puts those of training back."""

    def on_validation_start(self, trainer, pl_module):
        self.kept = [p.detach().clone() for p in pl_module.parameters()]
        shrink(pl_module)

    def on_validation_end(self, trainer, pl_module):
        with torch.no_grad():
            for p, kept in zip(pl_module.parameters(), self.kept):
                p.copy_(kept)


def in_module(move):
    class Moving(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            move(self)

    return Moving


class Validated(Model):
    def val_dataloader(self):
        return data(16, shuffle=False)


class Hooked(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: shrink(self))
        return optimizer


def said(*callbacks, model=Model, steps=26, monitor=None, **settings):
    """Return the monitor of a run, and the warnings that name a map between the steps."""
    monitor = monitor or StabilityMonitor(["mean_square_stability", "sharpness", "lyapunov"], every_n_steps=1, window=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(
            model,
            *[c if c is not StabilityMonitor else monitor for c in callbacks or (monitor,)],
            max_steps=steps,
            **settings,
        )
    return monitor, [w for w in seen if MOVED_BETWEEN[:60] in str(w.message)]


def last(history, key=COURANT):
    return history[key].values[-1]


@pytest.mark.parametrize("move", [shrink, clip_data, tie])
def test_a_map_in_the_modules_own_hook_is_noticed(move):
    monitor, warned = said(model=in_module(move))
    assert len(warned) == 1 and math.isnan(last(monitor.history))
    assert monitor.skipped["lyapunov"] == monitor.skipped["mean_square_stability"] == MOVED_BETWEEN
    assert math.isfinite(last(monitor.history, "stability/sharpness"))  # of the loss, which knows no update


def test_a_map_of_another_callback_or_of_a_hook_of_the_optimizer_is_noticed():
    for callbacks in ((Ending(shrink), StabilityMonitor), (StabilityMonitor, Ending(shrink))):
        monitor, warned = said(*callbacks)
        assert len(warned) == 1 and math.isnan(last(monitor.history))
    monitor, warned = said(model=Hooked)
    assert len(warned) == 1 and math.isnan(last(monitor.history))


def test_a_map_is_noticed_at_the_first_reading_where_readings_are_rare():
    monitor, warned = said(
        model=in_module(shrink), monitor=StabilityMonitor(["mean_square_stability"], every_n_steps=25)
    )
    assert len(warned) == 1
    assert all(math.isnan(value) for value in monitor.history[COURANT].values)  # also the first, at the step before


def test_a_map_of_every_third_step_is_noticed():
    monitor, warned = said(Ending(shrink, lambda step: step % 3 == 0), StabilityMonitor)
    assert len(warned) == 1 and math.isnan(last(monitor.history))


@pytest.mark.parametrize(
    "callback",
    [
        Ending(shrink, lambda step: step == 7),  # a return to earlier weights
        Ending(shrink, lambda step: False, lambda epoch: True),  # pruning, a new beginning, once an epoch
        Averaged(),
    ],
)
def test_what_happens_once_or_between_epochs_is_no_map(callback):
    monitor, warned = said(callback, StabilityMonitor, model=Validated, val_check_interval=2)
    assert not warned and "lyapunov" not in monitor.skipped
    assert math.isfinite(last(monitor.history)) and math.isfinite(last(monitor.history, "stability/lyapunov"))


def test_a_window_ends_where_weights_are_moved_once():
    monitor, _ = said(
        Ending(shrink, lambda step: step == 7),
        StabilityMonitor,
        monitor=StabilityMonitor(["lyapunov"], every_n_steps=1, window=5),
    )
    untouched, _ = said(monitor=StabilityMonitor(["lyapunov"], every_n_steps=1, window=5))
    steps, others = monitor.history["stability/lyapunov"].steps, untouched.history["stability/lyapunov"].steps
    assert steps[0] == others[0] and steps != others
    assert not any(step - 5 < 6 < step for step in steps if step not in others[:1])


def test_a_named_map_is_measured_as_before():
    monitor, warned = said(
        model=in_module(shrink),
        monitor=StabilityMonitor(["lyapunov"], every_n_steps=1, window=2, prox=lambda name, p, lr: 0.99 * p),
    )
    assert not warned and math.isfinite(last(monitor.history, "stability/lyapunov"))


@pytest.mark.parametrize("every", [1, 5])
def test_a_plain_loop_is_told_likewise(every):
    for move in (shrink, None):
        torch.manual_seed(0)
        net, monitor = mlp(), configured(["mean_square_stability"], every_n_steps=every)
        optimizer = MOMENTUM(net.parameters())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            watch = Watch(net, optimizer, cross_entropy, monitor)
            for _ in range(2):
                for batch in watch(data()):
                    optimizer.zero_grad()
                    cross_entropy(net, batch).backward()
                    optimizer.step()
                    move and move(net)
                watch.close() if _ else shrink(net)  # once between two epochs
        warned = [w for w in seen if MOVED_BETWEEN[:60] in str(w.message)]
        assert len(warned) == bool(move) and math.isnan(last(watch.history)) == bool(move)
