"""The callback that stops: what it counts, what it waits for, and how it sits in Lightning."""

import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness import SGD, Losses, Model, Rows, data, fit, mlp

from lsp_callbacks import Observation, StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.rate_record import RateRecord
from lsp_callbacks.monitor.losses import LEFT_OUT, ArrivedLoss
from lsp_callbacks.report import loss_alarm

KEY, LYAPUNOV, NORM = "stability/courant", "stability/lyapunov", "stability/spectral_norm_max"
NAN = math.nan


def stage(*callbacks):
    """As much of a trainer as the callback looks at."""
    epoch_loop = SimpleNamespace(_batches_that_stepped=7)
    return SimpleNamespace(
        callbacks=list(callbacks), callback_metrics={}, loggers=[Rows()], global_step=0,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
    )  # fmt: skip


def source(scheduled=NAN, rates=lambda: (0.1, 0.1)):
    return SimpleNamespace(coming_courant=lambda trainer: scheduled, rates=rates)


def feed(stop, values, losses=None, trainer=None, key=None, start=0, scheduled=NAN, rates=None):
    """One observation and one loss a step; returns the step of the stop, if any."""
    trainer = trainer or stage()
    used = [0.1] * len(values) if rates is None else [*rates]
    used.append(used[-1])
    stop._source = source(scheduled, lambda: (used[step - start + 1], used[step - start]))
    for step, value in enumerate(values, start):
        loss = 1.0 if losses is None else losses[step - start]
        values = value if isinstance(value, dict) else {key or stop.monitor: value}
        stop.receive(trainer, Observation(step, values))
        if stop.judge(trainer, step, [ArrivedLoss(step, float(loss))]):
            return step
    return None


@pytest.mark.parametrize(
    "values, settings, stops",
    [
        ([1.1] * 5, {}, 2),
        ([1.1] * 5, {"patience": 1}, 0),
        ([1.1, 0.5, 1.1, 1.1, 1.1], {}, 4),  # the mean of the last three
        ([1.1, 0.5, 1.6], {}, 2),
        ([1.1, NAN, 1.1, NAN, 1.1], {}, 4),  # NaN neither counts nor resets
        ([1.1, {"stability/other": 9.0}, 1.1, 1.1], {}, 3),  # another quantity's observation
        ([1.1] * 9, {"min_steps": 4}, 6),
        ([1.0] * 9, {}, None),  # the threshold itself is stable
        ([1.1] * 9, {"threshold": 1.2}, None),
        ([{LYAPUNOV: 0.1, f"{LYAPUNOV}_lower": -0.1}] * 9, {"monitor": LYAPUNOV}, 2),
        ([{LYAPUNOV: 0.1, f"{LYAPUNOV}_lower": -0.1}] * 9, {"monitor": f"{LYAPUNOV}_lower"}, None),
        ([math.inf] * 9, {}, 2),
    ],
)
def test_the_bare_rule(values, settings, stops):
    stop = StopOnInstability(**{"confirm": None} | settings)
    assert feed(stop, values) == stops == stop.stop_step


@pytest.mark.parametrize(
    "losses, stops",
    [
        ([1.0] * 99, False),
        ([1.0 + 0.1 * i for i in range(99)], True),
        ([-5.0 + 0.1 * i for i in range(99)], True),
        ([-5.0] * 99, False),
        ([1.0 - 0.1 * i for i in range(5)] + [0.6 + 0.1 * i for i in range(94)], True),
        ([1.0 - 0.01 * i for i in range(99)], False),
        ([1.0 + 0.1 * (-1) ** i for i in range(99)], False),
        ([1.0] * 9 + [0.001] * 900 + [0.06] * 90, False),  # memorised: a rise from nothing is noise
        ([1.0] * 9 + [0.001] * 900 + [0.9] * 90, True),
    ],
    ids=["flat", "growing", "growing below 0", "flat below 0", "falling, then rising", "falling", "wavering",
         "noise", "lost again"],
)  # fmt: skip
def test_the_loss_must_confirm(losses, stops):
    stop = StopOnInstability()
    assert (feed(stop, [1.1] * len(losses), losses) is not None) == stops
    assert stop.event_step == 2  # falling or not
    calm = [min(loss, 2.2) for loss in losses]  # at a number well below the edge, the loss alone does not stop
    assert feed(StopOnInstability(), [0.6] * len(losses), calm) is None


FALLING = [2.0 * 0.98**i for i in range(120)]  # to 0.18


def rise(to, stays=400):
    """Losses that fall, and rise within 20 steps to stay there."""
    return [*FALLING, *[FALLING[-1] + (to - FALLING[-1]) * min(i / 20, 1.0) for i in range(stays)]]


@pytest.mark.parametrize(
    "to, growth, stops",
    [
        (0.5, 1.0, False),  # at a constant rate, above the edge: it comes back
        (0.5, 0.99, False),
        (0.5, 1.01, True),  # the rate outruns what training can do about it
        (0.5, 1.0 + 1e-4, False),
        (0.5, math.nan, False),
        (0.3, 1.01, False),  # once a data set is memorised, a rise is noise
        (1.3, 1.0, True),  # half of what was learned is lost
        (1.3, math.nan, True),
    ],
)
def test_a_rise_that_comes_back_ends_nothing(to, growth, stops):
    losses = rise(to)[:200]
    rates = [0.1 * growth**i for i in range(200)]
    stop = StopOnInstability()
    at = feed(stop, [1.3] * 200, losses, rates=rates)
    assert (at is not None) == stops and stop.event_step == 2
    assert at is None or 120 < at <= (loss_alarm(losses) or 200) + 10
    assert at is None or ("rate grew" in stop.reason) == (growth > 1)
    assert feed(StopOnInstability(), [0.9] * 120 + [{}] * 80, losses, rates=[0.1] * 200) is None or to > 1


def test_a_rate_of_zero_has_not_grown():
    stop = StopOnInstability()
    assert feed(stop, [1.3] * 200, rise(0.5)[:200], rates=[0.0] * 200) is None


def test_what_the_rate_was_is_kept_with_the_state():
    losses, rates = rise(0.5)[:200], [0.1 * 1.01**i for i in range(200)]
    whole = StopOnInstability()
    at = feed(whole, [1.3] * 200, losses, rates=rates)
    first, second = StopOnInstability(), StopOnInstability()
    cut = at - 3
    feed(first, [1.3] * cut, losses[:cut], rates=rates[:cut])
    second.load_state_dict(first.state_dict())
    assert feed(second, [1.3] * 60, losses[cut:], start=cut, rates=rates[cut:]) == at


@pytest.mark.parametrize("scheduled, event, stops", [(0.9, False, False), (1.5, True, False), (30.0, True, True)])
def test_a_jump_of_the_rate_is_seen_before_it_is_used(scheduled, event, stops, caplog):
    stop = StopOnInstability()
    with caplog.at_level(logging.INFO):
        assert (feed(stop, [0.5], scheduled=scheduled) == 0) == stops
    assert (stop.event_step == 0) == event
    if stops:
        assert "was not used" in caplog.text and "30 times" in caplog.text
        assert feed(StopOnInstability(limit=None), [0.5], scheduled=scheduled) is None
        assert feed(StopOnInstability(limit=40.0), [0.5], scheduled=scheduled) is None
        # A rate that has been there for long, and was measured, is no jump.
        assert feed(StopOnInstability(), [20.0] * 9, scheduled=scheduled) is None
        assert feed(StopOnInstability("stability/lyapunov"), [-0.5], scheduled=scheduled) is None


def test_the_first_steps_confirm_nothing_unless_the_loss_is_lost():
    rising = [1.0 + 0.02 * i for i in range(59)]
    assert feed(StopOnInstability(), [1.1] * 59, rising) == 29
    assert feed(StopOnInstability(), [1.1] * 9, [1.0, 2.0, 3.0, NAN, NAN, NAN, NAN, NAN, NAN]) == 3


GD = "stability/courant_gd"


def test_the_headline_number_is_not_averaged_with_what_stands_in_for_it():
    """While the probes are collected, there is only the curvature of one batch, here 2.6 on a healthy run."""
    both = [{GD: 2.6}] * 3 + [{KEY: 0.3, GD: 2.6}] * 9
    stop = StopOnInstability(confirm=None, patience=4)
    assert feed(stop, both) is None and stop.event_step is None
    assert feed(StopOnInstability(confirm=None, patience=4), [{GD: 2.6}] * 9) == 3  # where nothing better comes


def test_where_the_headline_number_fails_the_other_one_goes_on():
    failing = [{KEY: 0.3, GD: 0.2}] * 5 + [{KEY: NAN, GD: 1.5}] * 9
    assert feed(StopOnInstability(confirm=None), failing) == 7
    assert feed(StopOnInstability(GD, confirm=None), failing) == 6  # (0.2 + 1.5 + 1.5) / 3
    back = [{KEY: 0.3, GD: 0.2}] * 5 + [{KEY: NAN, GD: 1.5}] * 2 + [{KEY: 0.3, GD: 1.5}] * 9
    assert feed(StopOnInstability(confirm=None), back) is None
    late = [{KEY: 0.3, GD: 0.2}] * 5 + [{GD: 1.5}, {KEY: 0.3}] * 9  # complete some steps later: nothing has failed
    assert feed(StopOnInstability(confirm=None), late) is None
    assert feed(StopOnInstability("stability/lyapunov", confirm=None), failing) is None


EXPLODED = [2.3, 50.0, 50.0, 50.0, 40.0, 30.0, 20.0, 9.0]


def test_a_calm_reading_of_a_network_that_has_exploded_does_not_count():
    """A softmax that is saturated has no Gauss-Newton matrix; the Hessian of the batch goes on."""
    blind = [{KEY: 0.5, GD: 0.5}] + [{KEY: 0.0, GD: 8.0}] * 3 + [{}] * 4
    stop = StopOnInstability()
    assert feed(stop, blind, EXPLODED) is None and stop.event_step == 3
    assert feed(StopOnInstability(), [{KEY: 0.5, GD: 0.5}] + [{KEY: 0.0, GD: 0.1}] * 7, EXPLODED) is None
    for values, losses, key in (
        (blind, [2.3] * 8, KEY),  # a healthy network is as stable as it says
        (blind, EXPLODED, "stability/courant_sgd"),  # another number was asked for
        ([{KEY: 0.5}] + [{KEY: 0.0}] * 7, EXPLODED, KEY),  # nothing stands in
    ):
        calm = StopOnInstability(key)
        feed(calm, [{**v, "stability/courant_sgd": v.get(KEY, NAN)} for v in values], losses)
        assert calm.event_step is None
    seen = StopOnInstability()  # what is above the threshold counts, and is not averaged with the other number
    feed(seen, [{KEY: 7.0, GD: 0.1}, {KEY: 0.0, GD: 0.1}, {KEY: 0.0, GD: 0.1}, {KEY: 7.0, GD: 0.1}] * 2, EXPLODED)
    assert seen.event_step == 4
    back = StopOnInstability()
    values = [{KEY: 0.5, GD: 0.5}] + [{KEY: 0.0, GD: 8.0}] * 2 + [{KEY: 0.5, GD: 8.0}] * 9
    assert feed(back, values, [2.3, 50.0, 50.0] + [2.0] * 9) is None and not back.events


def test_one_reading_of_a_network_that_has_exploded_is_enough():
    """Adam with a rate of 1 at the default cadence: read once, and then it sits at chance."""
    losses = [2.3, *[60.0 / (1 + i) for i in range(30)], *[2.4] * 60]
    once = [{}, {KEY: 0.0, GD: 8.0}, *[{}] * 89]
    stop = StopOnInstability()
    assert feed(stop, once, losses) == 59 and "courant_gd" in stop.reason
    assert feed(StopOnInstability(), once, losses, scheduled=0.01) == 59  # a critical rate that is as blind
    assert feed(StopOnInstability(), once, [2.3] * 91) is None
    assert feed(StopOnInstability(), [{}, {KEY: 0.0, GD: 4.0}, *[{}] * 89], losses) is None


def test_an_event_in_the_first_steps_hides_none_that_comes_later(caplog):
    values = [1.2] * 3 + [0.5] * 250 + [1.3] * 300 + [0.5, 1.3, 1.3, 1.3] * 20
    with caplog.at_level(logging.INFO):
        stop, trainer = StopOnInstability(), stage()
        falling = [0.99**k for k in range(len(values))]
        assert feed(stop, values, falling, trainer=trainer) is None
    assert stop.events == [2, 254] and stop.event_step == 2  # (0.5 + 1.3 + 1.3) / 3
    assert [row["stability/event"] for _, row in trainer.loggers[0].rows] == [2.0, 254.0]
    assert len([r for r in caplog.records if "event at" in r.message]) == 2
    longer = StopOnInstability(patience_steps=300)
    feed(longer, values, falling)
    assert longer.events == [2]  # the two are one


@pytest.mark.parametrize("values", [[0.9] * 40, [NAN] * 40, [{}] * 40, [{"stability/spectral_norm_max": 9.0}] * 40])
@pytest.mark.parametrize("lost", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"confirm": None}, {"min_steps": 1000}, {"monitor": LYAPUNOV}])
def test_a_loss_that_is_not_finite_ends_training_whatever_was_measured(values, lost, settings, caplog):
    for at in (0, 1, 17):
        stop = StopOnInstability(**settings)
        with caplog.at_level(logging.INFO):
            assert feed(stop, values, [1.0] * at + [lost] + [1.0] * 39) == at == stop.stop_step
        assert f"since step {at}" in stop.reason and stop.reason in caplog.text


def test_steps_that_a_gradient_scaler_leaves_out_do_not_count_but_not_for_ever():
    stop, trainer = StopOnInstability(), stage()
    stop._source = source()
    for step in range(100):
        left_out = step % 20 < 15
        assert not stop.judge(trainer, step, [ArrivedLoss(step, math.inf if left_out else 1.0, left_out)])
    stopped = [step for step in range(100, 130) if stop.judge(trainer, step, [ArrivedLoss(step, NAN, True)])]
    assert stopped == [100 + LEFT_OUT - 1]


@pytest.mark.parametrize(
    "readings, losses, stops",
    [
        ([60.0], [2.3] * 5 + [2.4] * 200, 59),  # it sits at chance
        ([60.0], [2.3] + [30.0] * 4 + [2.35] * 200, 59),  # after an explosion
        ([60.0], [2.3] + [300.0] * 9 + [2.35 - 0.02 * i for i in range(100)], None),  # that it survives
        ([6.0], [2.3] * 200, 59),
        ([5.5], [2.3] * 200, None),  # AdamW, while its rate warms up
        ([60.0, 2.0], [2.3] * 200, None),  # the next reading is another one
        ([60.0], [2.3 - 0.01 * i for i in range(200)], None),  # it falls
        ([60.0], [-2.3] * 200, 59),
        ([60.0], [-2.3 - 0.01 * i for i in range(200)], None),
    ],
)
def test_one_reading_far_above_the_edge_is_enough_where_the_loss_does_not_fall(readings, losses, stops):
    values = [*readings, *[{}] * (len(losses) - len(readings))]
    stop = StopOnInstability(patience_steps=10_000)
    assert feed(stop, values, losses) == stops
    if stops is not None:
        assert "has not fallen" in stop.reason
        assert feed(StopOnInstability(patience_steps=10_000), values, losses, scheduled=0.9) is None  # it has come down


def test_few_readings_suffice_after_some_steps():
    rising = [2.0] * 40 + [min(2.0 + 0.1 * i, 3.5) for i in range(260)]
    values = [1.2, 1.2, *[{}] * 298]
    stop = StopOnInstability()
    assert feed(StopOnInstability(), [1.2, *[{}] * 99], rising[:100]) is None  # one alone, and a loss that rises
    late = feed(stop, values, rising)
    assert stop.event_step == 100 == late
    assert feed(StopOnInstability(patience_steps=150), values, rising) == 150
    assert feed(StopOnInstability(patience_steps=1000), values, rising) is None
    assert feed(StopOnInstability(), [1.2, {}, 0.9, *[{}] * 297], rising) is None
    below = StopOnInstability()  # what is above must itself be that old
    feed(below, [0.5, *[{}] * 89, 3.0, *[{}] * 209])
    assert below.event_step == 190


FALLS_AND_RISES = [3.0 - 0.02 * i for i in range(100)] + [min(1.02**i, 6.0) for i in range(300)]


@pytest.mark.parametrize("values", [[{}] * 400, [NAN] * 400, [0.3] * 9 + [{}] * 391, [0.8] * 400])
def test_a_loss_alarm_is_enough_where_no_reading_calls_it_noise(values):
    stop, alarm = StopOnInstability(), loss_alarm(FALLS_AND_RISES)
    assert alarm <= feed(stop, values, FALLS_AND_RISES) <= alarm + 10 and "mean of 50 losses" in stop.reason
    assert ("unknown" in stop.reason) == (values[0] != 0.3 and values[0] != 0.8)
    assert feed(StopOnInstability(confirm=None), values, FALLS_AND_RISES) is None


def test_a_reading_well_below_the_edge_calls_a_loss_alarm_noise_unless_the_loss_has_exploded():
    assert feed(StopOnInstability(), [0.6] * 400, FALLS_AND_RISES) is None
    exploded = [3.0 - 0.02 * i for i in range(100)] + [1.1**i for i in range(300)]
    assert feed(StopOnInstability(), [0.6] * 400, exploded) is not None
    assert feed(StopOnInstability("stability/lyapunov"), [-0.1] * 400, FALLS_AND_RISES) is None
    assert feed(StopOnInstability("stability/lyapunov"), [{}] * 400, FALLS_AND_RISES) is not None


@pytest.mark.parametrize(
    "read, rates, to, stops",
    [
        (100, [0.1] * 300, 1.0, False),  # the rate is not the cause: a bad batch
        (100, [0.1] * 110 + [0.5] * 190, 1.0, True),  # 0.3 would be 1.5 by now
        (100, [0.1] * 110 + [0.2] * 190, 1.0, False),  # 0.6
        (100, [0.1] * 110 + [0.01] * 190, 1.0, False),
        (100, [NAN] * 300, 1.0, True),
        (9, [0.1] * 300, 1.0, True),  # too old
        (100, [0.1] * 300, 2.0, True),  # nothing is left of what was learned
        (130, [0.1] * 300, 2.0, False),  # it is stable while it rises
    ],
)
def test_a_reading_from_before_a_rise_speaks_of_it_where_the_rate_has_not_grown(read, rates, to, stops):
    losses, values = rise(to)[:170], [{}] * 170
    values[read] = 0.3
    stop, alarm = StopOnInstability(), loss_alarm(losses)
    at = feed(stop, values, losses, rates=rates)
    assert read < alarm < 160 and (at is not None) == stops
    assert at is None or at <= alarm + 10
    if read < 120:  # another number says nothing of the rate
        assert feed(StopOnInstability("stability/lyapunov"), [-1.0, *[{}] * 169], losses, rates=rates) is not None


def test_a_spike_is_not_waited_for_while_the_rate_grows_above_the_edge():
    losses = [*FALLING, *[4.0 * 0.8**i + 0.2 for i in range(60)]]
    alarm = loss_alarm(losses)
    assert alarm is not None
    assert feed(StopOnInstability(), [1.3] * 180, losses, rates=[0.1] * 180) != alarm
    assert feed(StopOnInstability(), [1.3] * 180, losses, rates=[0.1 * 1.001**i for i in range(180)]) == alarm
    assert feed(StopOnInstability(), [0.9] * 180, losses, rates=[0.1 * 1.001**i for i in range(180)]) != alarm


def test_one_spike_of_the_loss_is_over_in_ten_steps():
    losses = [2.0 - 0.01 * i for i in range(150)]
    for length, stops in ((1, False), (4, False), (12, True)):
        spike = [*losses[:100], *[90.0] * length, *losses[100:]]
        assert loss_alarm(spike) is not None
        assert (feed(StopOnInstability(), [{}] * len(spike), spike) is not None) == stops


def test_readings_above_the_edge_and_a_loss_that_does_not_fall_end_training():
    assert feed(StopOnInstability(), [1.1] * 200, [2.3] * 200) == 149
    assert feed(StopOnInstability(), [0.9] * 200, [2.3] * 200) is None
    assert feed(StopOnInstability(), [1.1] * 200, [2.3 * 0.99**i for i in range(200)]) is None


def test_an_explosion_in_the_first_steps_ends_training_where_nothing_was_measured_since():
    """The mean of the first five losses is that high already: there is no alarm."""
    losses = [2.3, *[30.0] * 300]
    assert loss_alarm(losses) is None
    stop = StopOnInstability()
    assert feed(stop, [{}] * 301, losses) == 199 and "unknown" in stop.reason
    assert feed(StopOnInstability(), [{}] * 301, [2.3, *[30.0] * 100, *[2.0] * 200]) is None


def test_after_a_jump_of_the_rate_the_loss_confirms():
    rising = [2.0 - 0.01 * i for i in range(100)] + [min(1.0 + 0.05 * i, 1.9) for i in range(100)]
    jumped = feed(StopOnInstability(), [0.1, *[{}] * 199], rising, scheduled=1.5)
    assert jumped is not None and 100 < jumped < 150
    assert feed(StopOnInstability(), [0.1, *[{}] * 199], rising, scheduled=0.15) is None


def test_a_collapse_ends_training_as_collapse(caplog):
    values = [{KEY: 0.01, "stability/collapsed": 0.0}] * 3 + [{KEY: 0.001, "stability/collapsed": 1.0}] * 3
    with caplog.at_level(logging.INFO):
        assert feed(StopOnInstability(), values) == 3
    assert "collapsed" in caplog.text


def test_outputs_that_are_alike_once_end_training_where_the_loss_has_not_fallen():
    values = [{KEY: 0.01, "stability/collapsed": 0.5}] + [{}] * 99
    assert feed(StopOnInstability(), values, [2.3] * 100) == 59
    assert feed(StopOnInstability(), values, [2.3 * 0.98**i for i in range(100)]) is None
    back = [{KEY: 0.01, "stability/collapsed": 0.5}, {KEY: 0.01, "stability/collapsed": 0.0}] + [{}] * 98
    assert feed(StopOnInstability(), back, [2.3] * 100) is None


def test_a_forecast_is_told_once(caplog):
    with caplog.at_level(logging.INFO):
        feed(StopOnInstability(), [{KEY: 0.5, "stability/steps_to_edge": 40.0}] * 3)
    (message,) = [r.message for r in caplog.records if "forecast" in r.message]
    assert "step 0" in message and "step 40" in message


def test_the_event_is_told_once(caplog):
    trainer, stop = stage(), StopOnInstability("stability/lyapunov", patience=1)
    with caplog.at_level(logging.INFO):
        feed(stop, [-0.1, 0.1, 0.2, -0.1, 0.1], trainer=trainer)
    (message,) = [r.message for r in caplog.records if "event" in r.message]
    assert "step 1" in message and "lyapunov = 0.1 > 0" in message
    assert trainer.callback_metrics["stability/event"] == 1.0
    assert trainer.loggers[0].rows == [(7, {"stability/event": 1.0})]


def test_the_stop_says_why_and_what_to_do(caplog):
    with caplog.at_level(logging.INFO):
        for settings in ({}, {"verbose": False}):
            feed(StopOnInstability(**settings), [1.1] * 40, [1.0 + 0.03 * i for i in range(40)])
    (message,) = [r.message for r in caplog.records if "stop at" in r.message]
    assert "step" in message and KEY in message and "lower learning rate" in message and "rose from 1 to" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_it_goes_on_from_its_state(cut, dtype):
    values, losses = [1.1, 1.1, 0.5, 1.1, 1.1, 1.1], [torch.tensor(1.0 - 0.1 * i, dtype=dtype) for i in range(6)]
    whole, first, second = (StopOnInstability(patience=4, confirm=None, threshold=1.2) for _ in range(3))
    feed(whole, values, losses), feed(first, values[:cut], losses[:cut])
    second.load_state_dict(first.state_dict())
    feed(second, values[cut:], losses[cut:], start=cut)
    assert second.state_dict() == whole.state_dict()


def test_it_goes_on_from_a_state_that_lacks_some_parts_and_has_others():
    stop = StopOnInstability()
    stop.load_state_dict({"events": [3], "stop_step": None, "stochastic": True, "smoothed": 2.0})
    assert stop.event_step == 3 and feed(stop, [1.1] * 3, start=4) is None


@pytest.mark.parametrize(
    "settings, message",
    [({"patience": 0}, "patience=0"), ({"confirm": "accuracy"}, "confirm='accuracy'"), ({"limit": 0.5}, "limit=0.5")],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StopOnInstability(**settings)


# -- inside Lightning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callbacks, message",
    [
        ([StopOnInstability()], "needs a StabilityMonitor"),
        ([StopOnInstability("stability/lyapunow"), StabilityMonitor()], "stability/lyapunow.*stability/lyapunov"),
        ([StabilityMonitor(["spectral_norm"]), StopOnInstability()], "never measured"),
    ],
)
def test_what_can_never_stop_is_refused(callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(Model, *callbacks)


@pytest.mark.parametrize("key", ["stability/residual_cfl_max", "stability/sharpness_limit", NORM])
def test_keys_that_may_appear_are_accepted(key):
    stop = StopOnInstability(key, patience=1)
    fit(Model, stop, StabilityMonitor(every_n_steps=1), max_steps=1)
    assert stop.threshold == 1.0 and (stop.event_step == 0) == (key == "stability/sharpness_limit")


def test_what_turns_out_not_to_be_measured_is_said_once():
    other = partial(Model, optimizer=torch.optim.Rprop)
    with pytest.warns(UserWarning, match="will never stop") as caught:
        fit(other, StopOnInstability(), StabilityMonitor(), max_epochs=3, max_steps=-1)
    assert len([w for w in caught if "will never stop" in str(w.message)]) == 1


def unstable():
    return Model(mlp(width=20), partial(SGD, lr=30.0))


@pytest.mark.parametrize("key", [KEY, LYAPUNOV])
def test_either_order_stops_at_the_same_step(key):
    found = []
    for order in (1, -1):
        monitor, stop, losses = StabilityMonitor(every_n_steps=1, window=1), StopOnInstability(key), Losses()
        trainer = fit(unstable, *[monitor, stop][::order], losses, max_steps=200)
        assert trainer.global_step == stop.stop_step + 1 == len(losses.losses) < 200  # at the step, not the epoch
        assert stop.event_step <= stop.stop_step
        found.append(stop.state_dict())
    assert found[0] == found[1]


def test_a_stable_run_has_no_event():
    stop = StopOnInstability()
    fit(partial(Model, optimizer=partial(SGD, lr=1e-3)), stop, StabilityMonitor(every_n_steps=1), max_steps=20)
    assert stop.event_step is stop.stop_step is None


def test_a_stopped_run_can_go_on_and_a_new_one_is_free():
    monitor = StabilityMonitor("economy", every_n_steps=1)
    first = StopOnInstability(KEY, threshold=-9, confirm=None)
    trainer = fit(Model, monitor, first)
    assert first.stop_step == 2
    trainer.should_stop = False  # Lightning 2.5.0 keeps it
    trainer.fit(trainer.model, data())  # whoever goes on is told again
    assert first.stop_step == 5
    second = StopOnInstability(KEY, threshold=1e9)
    assert fit(Model, monitor, second).global_step == 10  # the first one does not listen any more
    assert not monitor.subscribers
    assert fit(Model, monitor, first).global_step == 3 and first.stop_step == 2


def test_a_reading_that_is_complete_only_later_belongs_to_no_known_rate():
    rates = RateRecord()
    rates.add(0.5, 0.1, step=10, level_step=10, read_step=10)  # a schedule jumps after the step that was measured
    assert not rates.leaves_below(0.3, 0.7) and rates.leaves_below(0.1, 0.7)
    rates.add(0.5, 0.5, step=20, level_step=20, read_step=18)
    assert math.isnan(rates.measured) and not rates.leaves_below(0.1, 0.7)
