"""A ``training_step`` that returns None: Lightning counts the step and moves the schedule, the weights stay."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from harness import MOMENTUM, SGD, Model, Rows, everything, fit, same
from torch.utils.data import DataLoader

from lsp_callbacks import Snapshot, StabilityMonitor
from lsp_callbacks.step.series import Trace

SHARPNESS, LYAPUNOV, NORM = "stability/sharpness", "stability/lyapunov", "stability/spectral_norm_max"


class Returns(Model):
    """Has no loss in some batches; tells the schedule's length, which Lightning's own counter fills."""

    def __init__(self, skips, optimizer=MOMENTUM, zeros=False):
        super().__init__(optimizer=optimizer)
        self.skips, self.zeros = skips, zeros

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.log("norm", torch.stack([torch.linalg.matrix_norm(self.net[k].weight, 2) for k in (0, 2)]).max())
        return None if self.skips(batch_idx) else self.loss(batch)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=not self.zeros)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def every(period, first):
    return lambda batch_idx: batch_idx % period == first


@pytest.mark.parametrize("skips", [every(3, 2), every(2, 0), every(6, 0), every(5, 1)])
def test_steps_rows_and_schedule_are_lightnings_own(skips):
    rows, monitor = Rows(), StabilityMonitor(["sharpness", "lyapunov", "spectral_norm"], every_n_steps=1, window=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lsp_callbacks")
        run = fit(lambda: Returns(skips), monitor, logger=rows, log_every_n_steps=1, max_steps=24)
    assert monitor.step == run.global_step == 24
    taken = [step for step in range(24) if not skips(step % 6)]
    assert monitor.history[SHARPNESS].steps == taken == list(rows.curve(NORM))
    theirs = rows.curve("norm")
    assert list(theirs) == [*range(24)]
    for step, value in zip(taken, monitor.history[NORM].values):  # power iterations against the dense value
        assert value == pytest.approx(theirs[step], rel=1e-3), step


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM])
def test_the_exponent_is_that_of_the_steps_that_were_taken(optimizer, monkeypatch):
    """Only the other batches reach the second run: numbers must agree, at shifted steps."""
    monkeypatch.setattr(Snapshot, "generator", lambda self, key: torch.Generator().manual_seed(0))  # not by the step
    found = {}
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(24)]
    for name, skips, loader in (
        ("skips", every(4, 3), batches),
        ("never", lambda batch_idx: False, [batch for k, batch in enumerate(batches) if k % 4 != 3]),
    ):
        monitor = StabilityMonitor(["sharpness", "lyapunov"], every_n_steps=1, window=3)
        model = Returns(skips, optimizer)
        model.configure_optimizers = lambda model=model: model.optimizer(model.parameters())
        torch.manual_seed(2)
        for layer in (model.net[0], model.net[2]):
            layer.reset_parameters()
        fit(model, monitor, loader=DataLoader(loader, batch_size=None), max_steps=len(loader))
        found[name] = monitor.history
    assert found["skips"].keys() == found["never"].keys()
    for key, curve in found["never"].items():
        assert found["skips"][key].steps == [step + step // 3 for step in curve.steps], key
        assert found["skips"][key].values == pytest.approx(curve.values, rel=1e-6, nan_ok=True), key


def test_a_due_step_that_is_skipped_is_made_up_for():
    monitor = StabilityMonitor(["sharpness"], every_n_steps=6)
    fit(lambda: Returns(every(6, 0)), monitor, max_steps=24)  # each sixth step is due, and none has a loss
    assert monitor.history[SHARPNESS].steps == [1, 7, 13, 19]


def test_gradients_of_zero_move_the_weights_and_cut_the_window():
    """With momentum the weights go on in a batch without a loss where gradients are zeros, not None."""
    monitor = StabilityMonitor(["lyapunov"], every_n_steps=1, window=3)
    fit(lambda: Returns(every(3, 2), zeros=True), monitor, max_steps=12)
    assert LYAPUNOV not in monitor.history
    monitor = StabilityMonitor(["lyapunov"], every_n_steps=1, window=3)
    fit(lambda: Returns(every(3, 2)), monitor, max_steps=12)
    assert len(monitor.history[LYAPUNOV].steps) == 2


def test_the_run_stays_what_it_is():
    left = []
    for monitor in ([], [StabilityMonitor(every_n_steps=2)]):
        rows = Rows()
        run = fit(lambda: Returns(every(4, 1)), *monitor, logger=rows, log_every_n_steps=1, max_steps=20)
        left.append(everything(run, run.lightning_module, SimpleNamespace(losses=None), rows))
    assert same(*left)


def test_a_series_goes_on_over_steps_that_moved_nothing():
    trace = Trace(10, {})
    for step, previous in ((0, None), (1, None), (4, 1), (5, 4)):
        trace.record(step, torch.tensor(float(step)), previous=previous)
    assert trace.read()["loss"].tolist() == [0, 1, 4, 5]
    trace.record(8, torch.tensor(8.0), previous=7)  # step 7 was taken, and not seen
    assert trace.read()["loss"].tolist() == [8]
