"""The headline number of a step before its update, for whoever may still change the rate of that update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lsp_callbacks.autograd.side_effects import untouched
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.step.snapshot import Snapshot


def preview(monitor: Monitor, module: nn.Module, take_snapshot: Callable[[], Snapshot]) -> dict[str, float]:
    """Return what the quantity of the headline number would report of a step, and keep nothing of it.

    Where that cannot be told, nothing is returned; why, the measurement itself says.

    Args:
        monitor: that will measure the step.
        module: that is trained.
        take_snapshot: of the step, which can be replayed.

    Cost: one measurement of the headline number, from a replay.
    """
    quantity = monitor.quantities.get(monitor.headline or "")
    if quantity is None or quantity.window + quantity.prepare > 1:
        return {}
    try:
        with untouched(module):
            snapshot, copied = replace(take_snapshot(), readers={}), copy.deepcopy(quantity)
            try:
                snapshot.run.ranks.together(lambda: copied.update(snapshot))
                return copied.numbers() if copied.complete else {}
            finally:
                snapshot.forget()
    except Exception:
        return {}
