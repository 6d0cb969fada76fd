"""The callback that stops: what it counts, what it waits for, and how it sits in Lightning."""

import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from zoo import SGD, Losses, Model, Rows, data, fit, mlp

from lsp_callbacks import Observation, StabilityMonitor, StopOnInstability

KEY, COURANT, NORM = "stability/lyapunov", "stability/courant", "stability/spectral_norm_max"
NAN = math.nan


def stage(*callbacks):
    """As much of a trainer as the callback looks at."""
    epoch_loop = SimpleNamespace(_batches_that_stepped=7)
    return SimpleNamespace(
        callbacks=list(callbacks), callback_metrics={}, loggers=[Rows()], global_step=0,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
    )  # fmt: skip


def feed(stop, values, losses=None, trainer=None, key=None, start=0):
    """One observation and one loss a step; returns the step of the stop, if any."""
    trainer = trainer or stage()
    for step, value in enumerate(values, start):
        loss = 1.0 if losses is None else losses[step - start]
        stop.on_train_batch_start(trainer, None, None, step)
        values = value if isinstance(value, dict) else {key or stop.monitor: value}
        if stop.receive(trainer, Observation(step, values)):
            return step
        stop.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, step)
    return None


@pytest.mark.parametrize(
    "values, settings, stops",
    [
        ([0.1] * 5, {}, 2),
        ([0.1] * 5, {"patience": 1}, 0),
        ([0.1, -0.1, 0.1, 0.1, 0.1], {}, 4),  # below: counted again from the start
        ([0.1, NAN, 0.1, NAN, 0.1], {}, 4),  # NaN neither counts nor resets
        ([0.1, {"stability/other": 9.0}, 0.1, 0.1], {}, 3),  # another quantity's observation
        ([0.1] * 9, {"min_steps": 4}, 6),
        ([0.0] * 9, {}, None),  # the threshold itself is stable
        ([0.1] * 9, {"threshold": 0.2}, None),
        ([{KEY: 0.1, f"{KEY}_lower": -0.1}] * 9, {}, 2),
        ([{KEY: 0.1, f"{KEY}_lower": -0.1}] * 9, {"monitor": f"{KEY}_lower"}, None),  # the bound, where it is named
        ([0.9] * 9, {"monitor": COURANT}, None),
        ([1.1] * 9, {"monitor": COURANT}, 2),
        ([math.inf] * 9, {"monitor": COURANT}, 2),
    ],
)
def test_the_bare_rule(values, settings, stops):
    stop = StopOnInstability(**{"confirm": None} | settings)
    assert feed(stop, values) == stops == stop.stop_step


@pytest.mark.parametrize(
    "losses, stops",
    [
        ([1.0] * 60, True),
        ([1.0 + 0.1 * i for i in range(60)], True),
        ([-5.0 + 0.1 * i for i in range(60)], True),
        ([-5.0] * 60, True),
        ([1.0 - 0.1 * i for i in range(5)] + [0.6 + 0.1 * i for i in range(15)], True),
        ([1.0 - 0.015 * i for i in range(60)], False),
        ([1.0 + 0.05 * (-1) ** i for i in range(60)], False),
        ([NAN] * 60, True),
    ],
    ids=["flat", "growing", "growing below 0", "flat below 0", "falling, then rising", "falling", "wavering", "nan"],
)
def test_the_loss_must_confirm(losses, stops):
    stop = StopOnInstability()
    assert (feed(stop, [0.1] * 60, losses) is not None) == stops
    assert stop.event_step == 0  # falling or not


def test_the_event_is_told_once(caplog):
    trainer, stop = stage(), StopOnInstability(patience=9)
    with caplog.at_level(logging.INFO):
        feed(stop, [-0.1, 0.1, 0.2, -0.1, 0.1], trainer=trainer)
    (message,) = [r.message for r in caplog.records if "event" in r.message]
    assert "step 1" in message and f"{KEY} = 0.1 > 0" in message and "in 10 steps" in message
    assert trainer.callback_metrics["stability/event"] == 1.0
    assert trainer.loggers[0].rows == [(7, {"stability/event": 1.0})]


def test_the_stop_says_why_and_what_to_do(caplog):
    with caplog.at_level(logging.INFO):
        feed(StopOnInstability(), [0.1] * 9, [float(i) for i in range(1, 10)])
        feed(StopOnInstability(verbose=False), [0.1] * 9, [float(i) for i in range(1, 10)])
    (message,) = [r.message for r in caplog.records if "stop at" in r.message]
    assert "step" in message and KEY in message and "lower learning rate" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_it_goes_on_from_its_state(cut, dtype):
    values, losses = [0.1, 0.1, -0.1, 0.1, 0.1, 0.1], [torch.tensor(1.0 - 0.1 * i, dtype=dtype) for i in range(6)]
    whole, first, second = (StopOnInstability(patience=4, confirm=None) for _ in range(3))
    feed(whole, values, losses), feed(first, values[:cut], losses[:cut])
    second.load_state_dict(first.state_dict())
    feed(second, values[cut:], losses[cut:], start=cut)
    assert second.state_dict() == pytest.approx(whole.state_dict())


@pytest.mark.parametrize(
    "settings, message", [({"patience": 0}, "patience=0"), ({"confirm": "accuracy"}, "confirm='accuracy'")]
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
        ([StabilityMonitor("economy"), StopOnInstability()], "never measured"),
    ],
)
def test_what_can_never_stop_is_refused(callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(Model, *callbacks)


@pytest.mark.parametrize("key", ["stability/residual_cfl_max", "stability/sharpness_limit", NORM])
def test_keys_that_may_appear_are_accepted(key):
    stop = StopOnInstability(key)
    fit(Model, stop, StabilityMonitor(), max_steps=1)
    assert stop.threshold == 1.0 and (stop.event_step == 0) == (key == "stability/sharpness_limit")


def test_what_turns_out_not_to_be_measured_is_said_once():
    adam = partial(Model, optimizer=torch.optim.Adam)
    with pytest.warns(UserWarning, match="will never stop") as caught:
        fit(adam, StopOnInstability(), StabilityMonitor(), max_epochs=3, max_steps=-1)
    assert len([w for w in caught if "will never stop" in str(w.message)]) == 1


def unstable():
    return Model(mlp(width=20), partial(SGD, lr=30.0))


@pytest.mark.parametrize("key", [KEY, COURANT])
def test_either_order_stops_at_the_same_step(key):
    found = []
    for order in (1, -1):
        monitor, stop, losses = StabilityMonitor(every_n_steps=1, window=1), StopOnInstability(key), Losses()
        trainer = fit(unstable, *[monitor, stop][::order], losses, max_steps=200)
        assert trainer.global_step == stop.stop_step + 1 == len(losses.losses) < 200  # at the step, not the epoch
        assert stop.event_step <= stop.stop_step - 2
        found.append(stop.state_dict())
    assert found[0] == found[1]


def test_a_stable_run_has_no_event():
    stop = StopOnInstability()
    fit(partial(Model, optimizer=partial(SGD, lr=1e-3)), stop, StabilityMonitor(every_n_steps=1), max_steps=20)
    assert stop.event_step is stop.stop_step is None


def test_a_stopped_run_can_go_on_and_a_new_one_is_free():
    monitor = StabilityMonitor("economy", every_n_steps=1)
    first = StopOnInstability(COURANT, threshold=-9, confirm=None)
    trainer = fit(Model, monitor, first)
    assert first.stop_step == 2
    trainer.fit(trainer.model, data())  # whoever goes on is told again
    assert first.stop_step == 5
    second = StopOnInstability(COURANT, threshold=1e9)
    assert fit(Model, monitor, second).global_step == 10  # the first one does not listen any more
    assert not monitor.subscribers
    assert fit(Model, monitor, first).global_step == 3 and first.stop_step == 2
