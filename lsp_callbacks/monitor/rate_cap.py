"""Caps on learning rates, from critical rates that were measured: a cap falls at once, and rises step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Readings of which the lowest counts, or the middle one.
RECENT = 3
#: A rate within so many times below its cap is near: readings are wanted.
NEAR = 2.0
#: How much higher a rate may be than one at which the run was measured stable while its loss fell.
TOLERANCE = 1.1
#: By what a capped rate grows at most: from one update to the next, and beyond the rate of the last reading.
GROWTH, CONFIRMED = 1.03, 1.3
#: Before the loss has fallen, a rate within so many times below its cap is capped, too, and begins at this share of it.
EARLY, START = 4.0, 0.1


class RateCap:
    """Caps on the learning rates of parameter groups, from critical rates that were measured.

    A critical rate is that of all groups together: at group rates ``eta_g = eta r_g`` the linearised update is

        ``I - eta R P H``,  R the diagonal of ``r_g``, P the preconditioner, H the (Gauss-Newton) curvature,

    and eta is critical, not one group's rate: H couples the groups. So all rates are lowered by one factor, which
    leaves their ratios as the user chose them. Where the ratios have changed since the reading, no group may be above
    ``safety`` times the rate that it had at the critical point: with H positive semidefinite and P positive, the
    eigenvalues of ``(R P)^1/2 H (R P)^1/2`` are monotone in R, so that smaller rates are no less stable. A group that
    had no rate at the reading is not known, and sets no limit.

    - **A fall is followed at once** before the loss has fallen, and when it rises: the critical rate is the lowest of
      the last three readings. While the loss falls it is the middle one: single readings scatter, at times to a tenth,
      and where a fall is true, the next reading, which is wanted some steps later, says so, too.
    - **A rise has to be confirmed.** A capped rate grows by 3 % from one update to the next, and by 30 % beyond the
      rate at which the last reading was taken: the critical rate itself depends on the rate, as a network moves to
      places that are flat enough for it, which takes steps. So does a rate that was never used, after a jump.
    - **Before the loss has fallen** nothing is known of any rate, and the critical one may fall to a tenth within a few
      steps. There a rate that the run began with is capped from a quarter of its cap on, and begins at a tenth of the
      cap: a warm-up whose length is decided by measurement. One that grows, as in a warm-up of the user's, grows by 3 %
      from one update to the next.
    - **A rate of the schedule that was measured stable while the loss fell is trusted**: one that was below its cap and
      not lowered. No higher than by 10 % it is not capped, until the loss rises while the Courant number is above
      ``1 / safety``: where the rate stays and the critical one comes down to it, training goes on at the edge of
      stability, and is healthy. A lowered rate is never trusted: the cap has chosen it, and the loss also falls at
      rates that train worse.

    Args:
        safety: share of the critical rates that is allowed.
        max_age: steps after which a reading is too old to begin with: what is capped stays so until the next one.

    Attributes:
        limits: of the groups; none before a reading.
        trusted: rates of the groups at which the run was measured stable while its loss fell.
        step: of the last reading; -1 before it.
        is_on: whether the last update was capped.
        is_proven: whether the loss had fallen at a reading.

    Example:
        >>> cap = RateCap(safety=0.9, max_age=100)
        >>> cap.add(0, critical=1.0, relative=[1.0, 0.1], is_falling=True)
        >>> [round(cap.factor(rates, step=1), 2) for rates in ([0.5, 0.05], [2.0, 0.2], [0.5, 0.18])]
        [1.0, 0.45, 0.5]
    """

    def __init__(self, safety: float, max_age: int):
        self.safety, self.max_age = safety, max_age
        self.reset()

    def reset(self) -> None:
        """Forget all readings."""
        self._readings: list[list[float]] = []
        self._latest: list[tuple[int, float]] = []  # steps of the last two readings, and their critical rates
        self.limits: list[float] = []
        self.trusted: list[float] = []
        self._read_at: list[float] = []  # rates that the last measured step has used
        self._used: list[float] = []  # rates of the last update
        self._first: list[float] = []  # those of the first update
        self._used_step = -1
        self.step, self.is_on, self.is_proven = -1, False, False

    def add(
        self,
        step: int,
        *,
        critical: float,
        relative: Sequence[float],
        used: Sequence[float] = (),
        was_capped: bool = False,
        only_lower: bool = False,
        is_falling: bool = False,
        has_risen: bool = False,
    ) -> None:
        """Take in a reading.

        Args:
            step: that was measured.
            critical: the largest stable rate of the group with the highest one.
            relative: rates of all groups, relative to the highest.
            used: rates of all groups that the step has used.
            was_capped: whether these are lower than the schedule's.
            only_lower: whether the reading is not to be trusted where it allows more than the last one, which is then
                taken once more.
            is_falling: whether the loss has fallen since the start, and has not risen since.
            has_risen: whether it has risen.
        """
        reading = [critical * share if share > 0 else math.inf for share in relative]
        if self._readings and len(self._readings[-1]) != len(reading):  # groups have joined
            self._readings.clear()
        if only_lower and self._readings:
            reading = [min(pair) for pair in zip(reading, self._readings[-1])]
        self._readings, self.step = [*self._readings, reading][-RECENT:], step
        self._latest = [*(each for each in self._latest if each[0] < step), (step, critical)][-2:]
        self._read_at, self.is_proven = list(used), self.is_proven or is_falling
        if len(self.trusted) != len(reading):
            self.trusted = [0.0] * len(reading)
        middle = (len(self._readings) - 1) // 2 if self.is_proven and not has_risen else 0
        self.limits = [self.safety * sorted(group)[middle] for group in zip(*self._readings)]
        is_below = all(rate <= limit for rate, limit in zip(used, self.limits))
        if is_falling and used and is_below and not was_capped:
            self.trusted = [max(pair) for pair in zip(self.trusted, used)]
        elif has_risen and any(self.safety * rate > critical for rate, critical in zip(used, reading)):
            self.trusted = [0.0] * len(reading)

    def factor(self, rates: Sequence[float], *, step: int) -> float:
        """Return by what the rates of a coming update are to be multiplied: 1 where they may stay.

        Args:
            rates: of the groups, by the schedule.
            step: of the update.
        """
        if not self.is_on and step - self.step > self.max_age:
            return 1.0
        share = self._share(rates)
        least = 1.0 if self._is_trusted(rates) else min(1.0, share)
        is_early = not (self.is_on or self.is_proven) and share < EARLY
        if is_early and all(rate <= first for rate, first in zip(rates, self._first)):
            return min(1.0, START * share)
        if least == 1 and not (self.is_on or is_early):
            return 1.0
        growth = GROWTH ** max(1, step - self._used_step)
        least = min([least, *(growth * used / rate for used, rate in zip(self._used, rates) if used and rate)])
        return min([least, *(CONFIRMED * used / rate for used, rate in zip(self._read_at, rates) if used and rate)])

    def note(self, step: int, used: Sequence[float]) -> None:
        """Note the rates that an update uses."""
        self._used, self._used_step = list(used), step
        self._first = self._first or self._used

    def next_reading(self, rates: Sequence[float]) -> float:
        """Return the step at which the next reading is wanted; infinite where that of the budget is early enough.

        After half the time in which the critical rate, falling as it did between the last two readings, comes down to
        that of these rates; and no later than after twice the last gap while a cap is on or within a factor of 2.
        """
        margin = math.log(share) if (share := self._share(rates)) < math.inf else math.inf
        if not self._latest or margin == math.inf or (self._is_trusted(rates) and not self.is_on):
            return math.inf
        if len(self._latest) < 2:
            return self.step + 1
        (earlier, before), (later, now) = self._latest
        gap = later - earlier
        wanted = gap + 1 if self.is_on or margin < math.log(NEAR) else math.inf
        if now < before < math.inf:
            wanted = min(wanted, max(0.0, margin) / 2 * gap / math.log(before / now))
        return later + max(1, math.floor(wanted)) if wanted < math.inf else math.inf

    def is_exceeded(self, rates: Sequence[float]) -> bool:
        """Return whether a rate is above the cap of its group, be it too old or not."""
        return self._share(rates) < 1 and not self._is_trusted(rates)

    def largest(self, rates: Sequence[float]) -> float:
        """Return to what the highest of these rates would be lowered, were it higher; NaN before a reading."""
        return max(rates) * self._share(rates) if self.limits else math.nan

    def _share(self, rates: Sequence[float]) -> float:
        """Return by what all these rates may be multiplied; infinite before a reading."""
        return min((limit / rate for limit, rate in zip(self.limits, rates) if rate > 0), default=math.inf)

    def _is_trusted(self, rates: Sequence[float]) -> bool:
        """Return whether no rate is well above one at which the run was measured stable while its loss fell."""
        return bool(self.trusted) and all(rate <= TOLERANCE * trusted for rate, trusted in zip(rates, self.trusted))

    def state_dict(self) -> dict[str, Any]:
        """Return numbers only."""
        state = {name: value for name, value in vars(self).items() if name not in ("safety", "max_age")}
        return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        vars(self).update({name: list(value) if isinstance(value, list) else value for name, value in state.items()})
