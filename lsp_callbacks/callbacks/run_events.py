"""What happened in a run, by step: events, the loss alarm, a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsp_callbacks.callbacks.stop_on_instability import StopOnInstability
from lsp_callbacks.report import loss_alarm


def run_events(trainer: Any, steps: Sequence[int], losses: Sequence[float], stride: int) -> dict[str, int | None]:
    """Return the step of each event by its name, None where it has not happened.

    Args:
        trainer: Lightning's.
        steps: of the losses.
        losses: of the run, or means over several steps.
        stride: number of steps in a mean.
    """
    events: dict[str, int | None] = {}
    stop = next((c for c in trainer.callbacks if isinstance(c, StopOnInstability)), None)
    if stop is not None:
        name = stop.monitor.removeprefix("stability/")
        sign = "lyapunov" in name and stop.threshold == 0
        events["exponent turned positive" if sign else f"{name} above {stop.threshold:g}"] = stop.event_step
    alarm = loss_alarm(losses, stride=stride)
    events["loss alarm"] = None if alarm is None else steps[alarm]
    if stop is not None:
        events["stopped"] = stop.stop_step
    return events
