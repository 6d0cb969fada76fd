"""The largest stable learning rate by the last readings, with which a scheduled rate is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lsp_callbacks.monitor.courant_source import COURANT, MEAN_SQUARE, PREFERENCE, SGD

#: Where a headline number has its critical rate beside it.
CRITICAL = {MEAN_SQUARE: "stability/mean_square_lr", SGD: "stability/critical_lr"}
#: Readings in a mean, as everywhere.
RECENT = 3


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


class CriticalRate:
    """The mean of the last critical rates, with which scheduled rates are compared to forecast the edge.

    An arithmetic mean, which a single low reading does not move far: by it `StopOnInstability` decides, whose rules
    were fixed with it. What lowers rates, `RateCap`, has to follow a fall at once.

    Args:
        rates: of an earlier run.
        stochastic: whether those were of SGD itself, not of one batch's curvature.

    Attributes:
        mean: of the last ones; NaN before the first.
    """

    def __init__(self, rates: Sequence[float] = (), stochastic: bool = False):
        self.rates, self.stochastic = list(rates), stochastic
        self.mean = sum(self.rates) / len(self.rates) if self.rates else math.nan

    def add(self, values: Mapping[str, float], *, used: float) -> bool:
        """Take in a measurement at the rate ``used``; return True if it had a critical rate."""
        if CRITICAL[SGD] in values and not self.stochastic:  # before, it was that of one batch's curvature
            self.rates, self.stochastic, self.mean = [], True, math.nan
        critical = values.get(CRITICAL[SGD], math.nan) if self.stochastic else critical_rate(values, used=used)
        if not math.isfinite(critical):
            return False
        self.rates = [*self.rates, critical][-RECENT:]
        self.mean = sum(self.rates) / len(self.rates)
        return True

    def crossing(self, rates: Sequence[float]) -> int | None:
        """Return the index of the first rate above the critical one; None if there is none."""
        return next((k for k, future in enumerate(rates) if future > self.mean), None)
