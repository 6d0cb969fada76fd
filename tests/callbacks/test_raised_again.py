"""After a return the rate begins low where training begins anew, and is raised again by stable readings."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from harness import Rows, trainer
from test_roll_back import SCALE, Noisy, Seen, batches, run
from torch.utils.data import DataLoader

from lsp_callbacks import RollBackOnInstability, StabilityMonitor
from lsp_callbacks.callbacks.roll_back_on_instability import FROM_BEGINNING, STABLE_READINGS, STABLE_STEPS
from lsp_callbacks.callbacks.stable_states import RollBack, StableState


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor, scale", [(0.5, FROM_BEGINNING), (0.05, 0.05), (1.0, 1.0)])
def test_training_that_begins_anew_does_so_at_a_tenth_of_the_rate(tmp_path, factor, scale):
    seen = Seen()
    back, _ = run(tmp_path, lambda: Noisy([0]), seen, factor=factor, max_steps=4)
    assert [(each.state.step, each.scale) for each in back.roll_backs] == [(0, scale)]
    assert seen.rates[1:] == [(step, pytest.approx(scale * 0.05 * 0.99**step)) for step in range(4)]


@pytest.mark.filterwarnings("ignore")
def test_it_is_raised_again_step_by_step_and_that_goes_on_from_a_checkpoint(tmp_path):
    rows, seen = Rows(), Seen()
    back, _ = run(tmp_path / "a", lambda: Noisy([0]), seen, logger=rows, states=100, every=10, max_steps=140)
    assert rows.curve(SCALE) == pytest.approx({0: FROM_BEGINNING, 49: 0.2, 99: 0.4}) and back.scale == 0.4
    scale = [FROM_BEGINNING] * 50 + [0.2] * 50 + [0.4] * 40
    used = [rate for _, rate in seen.rates[1:]]
    assert used == pytest.approx([part * 0.05 * 0.99**step for step, part in enumerate(scale)])
    other = RollBackOnInstability()
    other.load_state_dict(back.state_dict())
    assert (other.scale, other._changed_step, other._stable) == (0.4, 100, back._stable) and len(back._stable) == 3


def after(
    *courants, step=STABLE_STEPS, returns=1, is_calm=True, scale=0.25, factor=0.5, limit=math.inf, at=9, **settings
):
    """The factor of the rate after these readings since a return at step 0, and steps without another one."""
    back = RollBackOnInstability(factor=factor, verbose=False, **settings)
    back.roll_backs = [RollBack(at, StableState(0, "", 1.0), scale, "", (), limit)] * returns
    back.scale, back._losses = scale, SimpleNamespace(is_calm=is_calm)
    wanted = []
    monitor = SimpleNamespace(cadence=SimpleNamespace(want=wanted.append))
    back._source = SimpleNamespace(
        forecast=SimpleNamespace(scale=scale), cap=None, observer=SimpleNamespace(step=step), monitor=monitor
    )
    back._stable = list(courants)[-STABLE_READINGS:]
    back._raise(SimpleNamespace(global_step=step, callback_metrics={}, loggers=[], logger=None), step - 1)
    is_raised_and_may_be_again = scale < back.scale < (limit if step <= at else 1.0)
    assert wanted == [step + STABLE_STEPS // STABLE_READINGS] * is_raised_and_may_be_again
    assert back._source.forecast.scale == back.scale
    assert (back._changed_step, back._stable) == (
        (step, []) if back.scale != scale else (0, list(courants)[-STABLE_READINGS:])
    )
    return back.scale


def test_it_is_raised_where_all_of_three_readings_would_stay_below_safety():
    assert after(0.1, 0.2, 0.44) == 0.5 and after(0.1, 0.46, 0.2) == 0.25
    assert after(9.0, 0.1, 0.1, 0.1) == 0.5  # the last three count
    assert after(0.1, 0.2, 0.44, safety=0.8) == 0.25
    assert after(0.5, 0.5, 0.5, scale=0.9) == 1.0  # no higher than the schedule


def test_it_is_not_raised_too_early_nor_in_alarm_nor_after_a_second_return_nor_by_other_numbers():
    low = (0.1, 0.1, 0.1)
    assert after(*low, step=STABLE_STEPS - 1) == after(*low[1:]) == 0.25
    assert after(*low, is_calm=False) == after(*low, returns=2) == 0.25
    assert after(*low, monitor="stability/courant_step") == 0.25
    assert after(*low, factor=1.0) == 0.25 and after(*low, scale=1.0) == 1.0


def test_it_stays_below_what_the_way_that_was_left_has_shown_until_that_is_passed():
    low = (0.1, 0.1, 0.1)
    assert after(*low, at=STABLE_STEPS, limit=0.3) == 0.3 and after(*low, at=STABLE_STEPS - 1, limit=0.3) == 0.5
    assert after(*low, at=STABLE_STEPS, limit=0.2) == 0.25  # nor is it lowered


class Sharpens(pl.LightningModule):
    """A parabola of curvature 2, and of 30 from step 12 on; the loss is NaN at step 20, once."""

    def __init__(self):
        super().__init__()
        self.net, self.breaks = torch.nn.Linear(1, 1, bias=False), True
        torch.nn.init.constant_(self.net.weight, 1e-3)

    def training_step(self, batch, batch_idx):
        loss = (15.0 if self.global_step >= 12 else 1.0) * self.net(batch).square().mean() + 1
        if self.breaks and self.global_step == 20:
            self.breaks, loss = False, loss * math.nan
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_least_critical_rate_on_the_way_that_was_left_counts(tmp_path):
    back = RollBackOnInstability(dirpath=str(tmp_path), factor=1.0, safety=0.8, every_n_steps=2, verbose=False)
    t = trainer(StabilityMonitor(["sharpness"], every_n_steps=1), back, max_steps=22)
    back.fit(t, Sharpens(), DataLoader(torch.ones(40, 1), batch_size=1))
    (only,) = back.roll_backs
    assert only.at == 21 and 8 <= only.state.step <= 12 and only.state.critical == pytest.approx(1.0, rel=1e-4)
    assert only.scale == only.limit == pytest.approx(0.8 * (2 / 30) / 0.1, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_first", [True, False])
def test_the_readings_that_raise_it_are_taken_beside_the_budget(tmp_path, is_first):
    measuring = StabilityMonitor(["sharpness"], budget=1e-3)
    back = RollBackOnInstability(dirpath=str(tmp_path), factor=0.25, every_n_steps=1000, verbose=False)
    t = trainer(*((measuring, back) if is_first else (back, measuring)), max_steps=100)
    torch.manual_seed(0)
    back.fit(t, Noisy([70]), batches())
    (only,) = back.roll_backs
    start = only.state.step
    steps = [step for step in measuring.history["stability/courant_gd"].steps if step >= start]
    assert start < 20 and back.scale == 1.0
    assert len(steps) >= STABLE_READINGS and steps[STABLE_READINGS - 1] <= start + STABLE_STEPS + 2
