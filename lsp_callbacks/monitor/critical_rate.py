"""The largest stable learning rate by what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lsp_callbacks.monitor.courant_source import COURANT, MEAN_SQUARE, PREFERENCE, SGD

#: Where a headline number has its critical rate beside it.
CRITICAL = {MEAN_SQUARE: "stability/mean_square_lr", SGD: "stability/critical_lr"}


def critical_rate(values: Mapping[str, float], *, used: float, key: str | None = None) -> float:
    """Return the largest stable learning rate by an observation; NaN if there is none, infinite if none is unstable.

    Args:
        values: of the observation, by key.
        used: the rate at which it was made; the largest of all groups.
        key: of the Courant number that counts; None takes the headline number, whichever that is.
    """
    if key is None:
        key = next((key for key in PREFERENCE if key in values and values[key] == values.get(COURANT)), COURANT)
    courant = values.get(key, math.nan)
    if courant == 0 and used > 0:
        return math.inf
    critical = values.get(CRITICAL.get(key, ""), used / courant if courant > 0 else math.nan)
    return critical if critical > 0 else math.nan
