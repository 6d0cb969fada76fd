"""Updates whose rates are kept below a cap, in any loop: set for the update alone, and known to the readings."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lsp_callbacks.monitor.courant_source import COURANT
from lsp_callbacks.monitor.critical_rate import critical_rate
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.losses import FALLEN, SMOOTHING
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.rate_cap import RateCap
from lsp_callbacks.monitor.rates_of_update import RatesOfUpdate

CAP, SCHEDULED, APPLIED = (f"stability/lr_{which}" for which in ("cap", "scheduled", "applied"))
#: Steps whose rates are kept, for readings that are complete some steps later.
KEPT = 64


class CappedStep(NamedTuple):
    """Rates of one of the last updates.

    Attributes:
        step: its number.
        rates: of the groups, by the schedule.
        relative: the same, relative to the highest.
        factor: by which all were multiplied.
    """

    step: int
    rates: list[float]
    relative: list[float]
    factor: float

    @property
    def used(self) -> list[float]:
        """The rates that the update has used."""
        return [rate * self.factor for rate in self.rates]


class CappedUpdates:
    """Lowers the rates of updates as a `RateCap` says, and tells that what was measured at them.

    Args:
        safety: share of the critical rate that is allowed.
        max_age: steps after which a reading is too old to begin to cap with.

    Attributes:
        cap: of the rates.
        steps: the last updates.
    """

    def __init__(self, safety: float, max_age: int):
        self.cap, self.lowered = RateCap(safety, max_age), RatesOfUpdate()
        self.reset()

    def reset(self) -> None:
        """Forget all readings and steps."""
        self.cap.reset()
        self.steps: deque[CappedStep] = deque(maxlen=KEPT)

    def lower(self, optimizer: torch.optim.Optimizer, step: int, factor: float, scale: float = 1.0) -> CappedStep:
        """Set the rates of the coming update, which are put back right after it.

        Args:
            optimizer: that makes it.
            step: its number.
            factor: by which the cap multiplies the rates of the schedule,
            scale: and somebody else.
        """
        rates = [scale * rate for rate in rates_of(optimizer)]
        at = CappedStep(step, rates, relative_rates(optimizer, rates), factor)
        self.cap.is_on = factor < 1
        self.cap.note(step, at.used)
        self.steps.append(at)
        if factor * scale != 1:
            self.lowered.multiply(optimizer, factor * scale)
        return at

    def take(self, monitor: Monitor, observation: Observation, loss: float) -> None:
        """Tell the cap what was measured.

        Args:
            monitor: that has measured it, and knows the losses up to that of the step.
            observation: of one of the last updates.
            loss: of that step.
        """
        losses, values, at = monitor.losses, observation.values, self.at(observation.step)
        courant, key = values.get(COURANT, math.nan), monitor.courant.key or ""
        # A headline number may be that of an earlier step, at which it was not known that it would be this one.
        if at is None or math.isnan(courant) or values.get(key) != courant:
            return
        critical = critical_rate(values, used=max(at.used), key=key)
        if math.isnan(critical):
            return
        is_broken = not math.isfinite(loss) or losses.exploded(loss) or values.get("stability/collapsed", 0.0) > 0
        has_fallen = losses.count >= SMOOTHING and losses.smoothed <= FALLEN * losses.start
        self.cap.add(
            at.step, critical=critical, relative=at.relative, used=at.used, was_capped=at.factor < 1,
            only_lower=is_broken, is_falling=has_fallen and losses.is_calm, has_risen=losses.risen or is_broken,
        )  # fmt: skip

    def want_reading(self, monitor: Monitor) -> None:
        """Ask for the next reading, after those that came were taken in."""
        if self.steps:
            monitor.cadence.want(self.cap.next_reading(self.steps[-1].rates))

    def shown(self, step: int) -> dict[str, float]:
        """Return the scheduled and the applied rate of one of the last steps, and the cap, by their keys."""
        if (at := self.at(step)) is None:
            return {}
        largest = self.cap.largest(at.rates)
        shown = {CAP: largest} if math.isfinite(largest) else {}
        return shown | {SCHEDULED: max(at.rates), APPLIED: max(at.used)}

    def at(self, step: int) -> CappedStep | None:
        """Return one of the last updates."""
        return next((each for each in self.steps if each.step == step), None)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the rates of the parameter groups."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def relative_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> list[float]:
    """Return the rates of the groups, relative to the largest; by ``initial_lr`` where a warm-up begins at 0."""
    if not any(rates):
        rates = [float(group.get("initial_lr", 1.0)) for group in optimizer.param_groups]
    largest = max(rates) or 1.0
    return [rate / largest for rate in rates]
