"""After a return the rate begins low where training begins anew, and is raised again by stable readings."""

from types import SimpleNamespace

import pytest
from harness import Rows
from test_roll_back import SCALE, Noisy, Seen, run

from lsp_callbacks import RollBackOnInstability
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


def after(*courants, step=STABLE_STEPS, returns=1, is_calm=True, scale=0.25, factor=0.5, **settings):
    """The factor of the rate after these readings since a return at step 0, and steps without another one."""
    back = RollBackOnInstability(factor=factor, verbose=False, **settings)
    back.roll_backs = [RollBack(9, StableState(0, "", 1.0), scale, "")] * returns
    back.scale, back._losses = scale, SimpleNamespace(is_calm=is_calm)
    back._source = SimpleNamespace(forecast=SimpleNamespace(scale=scale))
    back._stable = list(courants)[-STABLE_READINGS:]
    back._raise(SimpleNamespace(global_step=step, callback_metrics={}, loggers=[], logger=None), step - 1)
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
