"""When one quantity is measured, and what a measurement of it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

#: What a second measurement costs over the first, until its price is found out: it starts from the first.
SECOND = 0.5


def union(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what measurements of one step spend gradients on: what several of them spend on the same counts once."""
    shared: dict[str, float] = {}
    for measurement in parts:
        for part, gradients in measurement.items():
            shared[part] = max(shared.get(part, 0.0), gradients)
    return shared


@dataclass
class Pace:
    """The measurements of one quantity so far, and the price of the next.

    Args:
        weight: how fast the quantity moves, beside the weights of the others.
        length: steps that a measurement takes.
        every_n_steps: start one every so many steps; None keeps to the budget.

    Attributes:
        parts: gradients that a measurement costs, by what they are spent on; None before they are known.
        first, started: steps of the first and of the last measurement that was started; None before it.
        count: measurements that were started.
        is_promised: whether the advance pays the first measurement.
        is_stale: whether the price may be another one now.
        postponed: the step from which on it need not wait any more; None where it does not wait.
        is_cold: whether the price is that of the first measurement.
    """

    weight: float = 1.0
    length: int = 1
    every_n_steps: int | None = None
    parts: dict[str, float] | None = None
    first: int | None = None
    started: int | None = None
    count: int = 0
    is_promised: bool = False
    is_stale: bool = False
    postponed: int | None = None
    is_cold: bool = False

    @property
    def price(self) -> float:
        """Gradients of a measurement by itself; 0 before they are known."""
        return sum((self.parts or {}).values())

    def price_beside(self, parts: Mapping[str, float]) -> float:
        """Return what a measurement costs in a step that spends gradients on these parts already."""
        return self.warmth * sum(max(0.0, price - parts.get(part, 0.0)) for part, price in (self.parts or {}).items())

    @property
    def warmth(self) -> float:
        """What the next measurement is expected to cost over the known price: that of a second one comes later."""
        return SECOND if self.is_cold and self.count else 1.0

    @property
    def doubling(self) -> int:
        """Steps to the next of the first readings, which are at 0, 1, 2, 4, 8, ... from the first one on."""
        return 1 if self.first is None or self.started is None else max(1, self.started - self.first)

    def early(self, period: float) -> int:
        """Return how many first readings, at doubling distances of less than a period, are still to come."""
        done = -1 if self.first is None or self.started is None else self.started - self.first
        most = max(0, math.ceil(math.log2(period))) if period > 0 else 0
        return sum(done < offset < period for offset in (0, *(2**k for k in range(most + 1))))

    def wants_price(self) -> bool:
        """Return whether the price is to be found out: before measurement number 1, 2, 3, 5, 9, 17, ...

        A second measurement starts from the first and is cheaper, and what is learnt later may change it again.
        """
        return self.parts is None or self.is_stale or self.count & (self.count - 1) == 0

    def start(self, step: int) -> None:
        """Count a measurement that starts at this step."""
        self.first = step if self.first is None else self.first
        self.started, self.postponed, self.count = step, None, self.count + 1

    def state_dict(self) -> list[Any]:
        """Return what was measured, without the settings, as a list: it is short in a checkpoint."""
        return [getattr(self, field.name) for field in fields(self)[3:]]

    def load_state_dict(self, state: list[Any]) -> None:
        """Continue from a state, with the settings of this one."""
        for field, value in zip(fields(self)[3:], state, strict=True):
            setattr(self, field.name, value)
        self.parts = None if self.parts is None else dict(self.parts)
