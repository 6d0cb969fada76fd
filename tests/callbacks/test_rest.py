"""Steps at which nothing is measured: a run that rests in them is one that does not."""

import math

import pytest
import pytorch_lightning as pl
import torch
from harness import Model, fit

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.rest import HOOKS, Rest

STEPS = 160


class Bumps(Model):
    """A loss of zero at some steps, none at others, and a rate that grows."""

    nan_at = STEPS

    def training_step(self, batch, batch_idx):
        if self.global_step in (83, 84):
            return None
        loss = super().training_step(batch, batch_idx)
        return loss * (math.nan if self.global_step == self.nan_at else 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + (step > 110) * 0.2 * (step - 110))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sees(pl.Callback):
    """What a step has left, and which hooks it had."""

    def __init__(self, monitor):
        self.monitor, self.seen, self.hidden = monitor, [], 0

    def on_train_batch_end(self, trainer, *args):
        monitor = self.monitor
        self.hidden += all(vars(monitor).get(hook, 0) is None for hook in HOOKS)
        age = trainer.callback_metrics["stability/age"].item()
        self.seen.append((trainer.global_step, monitor.observer.step, monitor.observer.previous, age))


def run(model=Bumps, **settings):
    monitor, stop = StabilityMonitor(), StopOnInstability(verbose=False)
    sees = Sees(monitor)
    trainer = fit(model, monitor, stop, sees, max_steps=STEPS, **settings)
    return monitor, stop, sees, trainer


def test_a_rest_changes_nothing(monkeypatch):
    rested = run()
    monkeypatch.setattr(Rest, "begin_after", lambda self, trainer: None)
    awake = run()
    assert rested[2].hidden > STEPS / 2 and not awake[2].hidden
    assert rested[2].seen == awake[2].seen and len(awake[2].seen) == STEPS
    assert rested[0].history == awake[0].history and rested[0].verdict == awake[0].verdict
    for a, b in zip(rested[:2], awake[:2]):
        assert str(a.state_dict()) == str(b.state_dict())
    assert all(vars(rested[0]).get(hook, 0) is not None for hook in HOOKS)


@pytest.mark.parametrize("step", [101, 102, 103, 104])
def test_a_loss_that_is_not_finite_ends_a_rest_and_the_run_at_its_step(step):
    class Nan(Bumps):
        nan_at = step

    _, stop, sees, trainer = run(Nan)
    assert sees.hidden and stop.stop_step == step and trainer.global_step == step + 1 and "loss is nan" in stop.reason


def test_a_hook_that_a_class_of_the_users_overrides_is_called_at_every_step():
    class Own(StabilityMonitor):
        calls = 0

        def on_train_batch_start(self, *args):
            self.calls += 1
            super().on_train_batch_start(*args)

    monitor = Own(["spectral_norm"])
    fit(Model, monitor, max_steps=90)
    assert (
        monitor.calls == monitor.observer.step == 90 and len(monitor.history["stability/spectral_norm_max"].steps) > 4
    )
