"""Caps on learning rates, from the critical rates of the last readings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Readings in a mean, as everywhere.
RECENT = 3
#: How much larger than the latest a reading may be that is taken with it.
FALLEN = 2.0


class RateCap:
    """Caps on the learning rates of parameter groups, from critical rates that were measured.

    A critical rate is that of all groups together: at group rates ``eta_g = eta r_g`` the linearised update is

        ``I - eta R P H``,  R the diagonal of ``r_g``, P the preconditioner, H the (Gauss-Newton) curvature,

    and eta is critical, not one group's rate: H couples the groups. So all rates are lowered by one factor, which
    leaves their ratios as the user chose them. Where the ratios have changed since the reading, no group may be above
    ``safety`` times the rate that it had at the critical point: with H positive semidefinite and P positive, the
    eigenvalues of ``(R P)^1/2 H (R P)^1/2`` are monotone in R, so that smaller rates are no less stable. A group that
    had no rate at the reading is not known, and sets no limit.

    A reading scatters. The critical rate is that of the mean Courant number of the last three at one rate, so the
    harmonic mean of theirs, which follows a fall; training is stopped by an arithmetic one, see `CriticalRate`. One
    that is more than twice the latest is not scatter, and is left out: in the first steps of a run the critical rate
    may fall to a tenth from one reading to the next, and a fall is followed at once.

    Args:
        safety: share of the critical rates that is allowed.
        max_age: steps after which a reading is too old to begin with: what is capped stays so until the next one.

    Attributes:
        limits: caps of the groups; none before a reading.
        step: of the last reading; -1 before it.
        is_on: whether the last update was capped.

    Example:
        >>> cap = RateCap(safety=0.9, max_age=100)
        >>> cap.add(0, critical=1.0, relative=[1.0, 0.1])
        >>> [round(cap.factor(rates, step=1), 2) for rates in ([0.5, 0.05], [2.0, 0.2], [0.5, 0.18])]
        [1.0, 0.45, 0.5]
    """

    def __init__(self, safety: float, max_age: int):
        self.safety, self.max_age = safety, max_age
        self.reset()

    def reset(self) -> None:
        """Forget all readings."""
        self._readings: list[list[float]] = []
        self.limits: list[float] = []
        self.step, self.is_on = -1, False

    def add(self, step: int, *, critical: float, relative: Sequence[float], only_lower: bool = False) -> None:
        """Take in a reading.

        Args:
            step: that was measured.
            critical: the largest stable rate of the group with the highest one.
            relative: rates of all groups, relative to the highest.
            only_lower: whether the reading is not to be trusted where it allows more than the last one, which is then
                taken once more.
        """
        reading = [critical * share if share > 0 else math.inf for share in relative]
        if self._readings and len(self._readings[-1]) != len(reading):  # groups have joined
            self._readings.clear()
        if only_lower and self._readings:
            reading = [min(pair) for pair in zip(reading, self._readings[-1])]
        recent = [before for before in self._readings if not any(a > FALLEN * b for a, b in zip(before, reading))]
        self._readings, self.step = [*recent, reading][-RECENT:], step
        self.limits = [self.safety * _harmonic_mean(group) for group in zip(*self._readings)]

    def factor(self, rates: Sequence[float], *, step: int) -> float:
        """Return by what the rates of a coming update are to be multiplied: 1 where they may stay.

        Args:
            rates: of the groups, by the schedule.
            step: of the update.
        """
        least = 1.0
        for limit, rate in zip(self.limits, rates):
            if rate > limit:
                least = min(least, limit / rate)
        return 1.0 if not self.is_on and step - self.step > self.max_age else least

    def is_exceeded(self, rates: Sequence[float]) -> bool:
        """Return whether a rate is above the cap of its group, be it too old or not."""
        return any(rate > limit for rate, limit in zip(rates, self.limits))

    def largest(self, rates: Sequence[float]) -> float:
        """Return to what the highest of these rates would be lowered, were it higher; NaN before a reading."""
        ratios = [limit / rate for limit, rate in zip(self.limits, rates) if rate > 0]
        return max(rates) * min(ratios) if ratios else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return numbers only."""
        return {
            "readings": [list(reading) for reading in self._readings], "limits": list(self.limits),
            "step": self.step, "is_on": self.is_on,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._readings, self.limits = [list(reading) for reading in state["readings"]], list(state["limits"])
        self.step, self.is_on = state["step"], state["is_on"]


def _harmonic_mean(rates: Sequence[float]) -> float:
    """Return the harmonic mean of rates, of which some may be infinite."""
    total = sum(1 / rate for rate in rates)
    return len(rates) / total if total else math.inf
