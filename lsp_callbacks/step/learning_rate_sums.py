"""The learning rates of a run, remembered in few numbers."""

from __future__ import annotations

import math
from typing import Any

#: Marks in an octave of steps, and how many are kept: three octaves with both ends.
DENSITY, KEPT = 8, 25


class LearningRateSums:
    """The sums of the learning rates and of their squares, and marks from which their decay can be estimated.

    There is a mark at the steps 8, 9, ..., 15, 16, 18, ..., 30, 32, 36, ..., eight in each octave, so that with t also
    t/2, t/4 and t/8 have one. The sum of the rates from one mark to the next is kept (differences of larger sums would
    be lost to rounding as the rates decay), for the last three octaves: that is enough for
    `lsp_callbacks.functional.rate_decay`, and no schedule is stored. Between steps that are missing the rate is assumed
    to be constant.

    Attributes:
        total: sum of the rates of all recorded steps.
        squares: sum of their squares.
        marks: by step, the sum since the mark before.
        gap: the most steps between two that were recorded.
    """

    def __init__(self) -> None:
        self.total = self.squares = 0.0
        self._forget()

    def _forget(self) -> None:
        self.marks: dict[int, float] = {}
        self.gap = 1
        self._sum = self._rate = 0.0  # since the last mark; of the last step
        self._step: int | None = None
        self._next = DENSITY

    def add(self, step: int, rate: float) -> None:
        """Add the rate of a step; one that is not finite, or a step backwards, begins the marks anew."""
        if not math.isfinite(rate):
            self._forget()
            return
        self.total, self.squares = self.total + rate, self.squares + rate * rate
        if self._step is not None and step <= self._step:
            self._forget()
        at = last = step if self._step is None else self._step
        while self._next <= step:
            if self._next >= at:
                self.marks[self._next] = self._sum + self._rate * (self._next - at)
                self._sum, at = 0.0, self._next
            self._next += max(1, 2 ** (self._next.bit_length() - DENSITY.bit_length()))
        self.marks = dict(list(self.marks.items())[-KEPT:])
        self._sum += self._rate * (step - at)
        self.gap = max(self.gap, step - last)
        self._step, self._rate = step, rate

    def state_dict(self) -> dict[str, Any]:
        """Return numbers only."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        vars(self).update({name: state[name] for name in vars(self)} | {"marks": dict(state["marks"])})
