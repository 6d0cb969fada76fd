"""What becomes invalid where a step did not move the parameters as the optimizer's step does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.key import PREFIX

if TYPE_CHECKING:
    from lsp_callbacks.monitor.monitor import Monitor


def lost_keys(quantities: Iterable[Quantity]) -> list[str]:
    """Return the keys that quantities which go on without the update do not report any more."""
    return [
        key
        for quantity in quantities
        if quantity.without_update
        for key in (*quantity.keys, *quantity.optional)
        if key not in quantity.without_update
    ]


def invalidated(monitor: Monitor, observation: Observation | None, reason: str) -> Observation | None:
    """Return an observation without the numbers that depend on the update; see `Monitor.invalidate_update_metrics`."""
    wrong = {name: quantity for name, quantity in monitor.quantities.items() if quantity.needs_update}
    if monitor.quantities.strict and wrong:
        raise Unmeasurable(f"{' and '.join(wrong)}: {reason}")
    names = [name for name, quantity in wrong.items() if not quantity.without_update]
    if monitor.invalidated is None:
        lost = [key.removeprefix(PREFIX) for key in lost_keys(wrong.values())]
        names += [name for name in lost if name not in monitor.quantities.skipped]
    monitor.skip({reason: names} if names else {}, stacklevel=4)
    monitor.invalidated = monitor.invalidated or reason
    monitor.cadence.forget_prices()
    if observation is None:
        return None
    keys = {
        key
        for quantity in wrong.values()
        if quantity.complete
        for key in quantity.compute()
        if key not in quantity.without_update
    }
    keys = (keys | monitor.courant.invalidate(keys & observation.values.keys())) & observation.values.keys()
    monitor.history.invalidate(keys)
    values = observation.values | dict.fromkeys(keys, math.nan)
    return Observation(observation.step, values, dict.fromkeys(wrong, reason))
