"""Measurements that are completed by the update of their step."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.quantities import Quantity

if TYPE_CHECKING:
    from lsp_callbacks.monitor.monitor import Monitor


def completed_after_update(monitor: Monitor, *, is_own: bool = True) -> Observation | None:
    """Return what the update of the last step has completed, with its curves; see `Monitor.after_update`."""
    observation = None
    for name in sorted(monitor.quantities.awaiting()):
        quantity = monitor.quantities[name]
        taken = quantity.awaited
        assert taken is not None
        monitor.cadence.under_way.discard(name)  # it is over, with a reading or without
        if not is_own:
            quantity.awaited = None
            continue
        failures: dict[str, str] = {}
        try:
            values = taken.run.ranks.together(partial(_values, quantity))
        except Exception as error:
            if monitor.quantities.strict:
                raise
            quantity.load_vectors({})
            failures[name] = f"{type(error).__name__}: {error}"
            values = dict.fromkeys(quantity.keys, math.nan)
            monitor.paths.pop(name, None)
            monitor.errors.report(failures, taken.step, warn=taken.run.ranks.rank == 0)
        if values:
            completed = monitor.history.add(Observation(taken.step, {}, failures), values)
            observation = completed if observation is None else observation.joined(completed)
    return observation


def _values(quantity: Quantity) -> dict[str, float]:
    """Return the values of a measurement that is complete now; none where it gave no reading."""
    quantity.complete = False
    quantity.after_update()
    return {key: float(value) for key, value in quantity.compute().items()} if quantity.complete else {}
