"""What happened in a run and when, from its logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.report.curves import loss_alarm, readings
from lsp_callbacks.report.logs.facts import EVENT, NONFINITE, STOP, stride_of

#: Curves with a level that matters, and how passing it is called.
LEVELS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("courant", lambda value: value > 1, "Courant number above 1"),
    ("lyapunov", lambda value: value > 0, "exponent above 0"),
    ("courant_step", lambda value: value > 1, "curvature along the last updates above 1"),
    ("collapsed", lambda value: value > 0.5, "network collapsed"),
)


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: number of the optimizer step.
        name: in a few words.
        detail: what is known of it.
        marked: whether figures show it.
    """

    step: int
    name: str
    detail: str
    marked: bool = False


def events(history: Mapping[str, Curve], loss: Curve | None = None) -> list[Event]:
    """Return what happened, by step: what callbacks have logged, first readings beyond a level, the loss.

    Args:
        history: curves of stability.
        loss: of the training.
    """
    happened = []
    for key, name, detail in (
        (EVENT, "event", "StopOnInstability saw its number above the threshold"),
        (STOP, "stopped", "StopOnInstability ended the training"),
        (NONFINITE, "first NaN or Inf", "in a loss or gradient"),
    ):
        values = readings(history.get(key))
        happened += [Event(int(step), name, detail, True) for step in values if math.isfinite(step)]
    for name, is_beyond, words in LEVELS:
        happened += _first(history.get(f"stability/{name}"), is_beyond, words)
    for key, curve in history.items():
        failed = [step for step, value in zip(curve.steps, curve.values) if math.isnan(value)]
        if failed and key.count("/") == 1:
            detail = f"{len(failed):,} of {len(curve.steps):,} measurements, the last at step {failed[-1]:,}"
            happened.append(Event(failed[0], f"{key.removeprefix('stability/')} failed (NaN)", detail))
    if loss is not None:
        happened += _of_the_loss(loss)
    return sorted(happened, key=lambda event: event.step)


def _first(curve: Curve | None, is_beyond: Callable[[float], bool], words: str) -> list[Event]:
    beyond = [] if curve is None else [(s, v) for s, v in zip(curve.steps, curve.values) if is_beyond(v)]
    if not beyond:
        return []
    count = len(readings(curve))
    detail = f"{beyond[0][1]:.3g} at first; {len(beyond):,} of {count:,} readings, the last at step {beyond[-1][0]:,}"
    return [Event(beyond[0][0], words, detail)]


def _of_the_loss(loss: Curve) -> list[Event]:
    happened = []
    alarm = loss_alarm(loss.values, stride=stride_of(loss))
    if alarm is not None:
        detail = "the mean of 50 steps is above twice its least value and a quarter of the initial loss, or not finite"
        happened.append(Event(loss.steps[alarm], "loss alarm", detail, True))
    broken = [step for step, value in zip(loss.steps, loss.values) if not math.isfinite(value)]
    if broken:
        detail = f"{len(broken):,} of {len(loss.values):,} logged losses, the last at step {broken[-1]:,}"
        happened.append(Event(broken[0], "loss not finite", detail))
    return happened
