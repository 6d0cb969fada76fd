"""What the learning rate was when the loss was level, and when something was measured."""

from __future__ import annotations

import math
from typing import Any


class RateRecord:
    """The learning rate of now, beside that of two moments before; NaN where it is not known.

    It is looked at only while the loss is not calm, or something was measured.

    Attributes:
        now: the rate that the optimizer has.
        level: what it was when the loss had last not risen.
        measured: that of the step of the last reading.
    """

    def __init__(self) -> None:
        self.now = self.level = self.measured = math.nan
        self._level_step = self._read_step = -1

    def add(self, now: float, used: float, *, step: int, level_step: int, read_step: int) -> None:
        """Take in the rates after a step.

        Args:
            now: the rate that the optimizer has, for the next step.
            used: that of the last measured step.
            step: number of the step.
            level_step: the last step at which the loss had not risen.
            read_step: the step of the last reading; one that is complete only later belongs to a rate that is gone.
        """
        self.now = now
        if level_step != self._level_step:
            self.level, self._level_step = now, level_step
        if read_step != self._read_step:
            self.measured, self._read_step = used if read_step == step else math.nan, read_step

    def has_grown(self, factor: float = 1.0) -> bool:
        """Return True if the rate has grown since the loss was level, and by this factor."""
        return self.now > self.level and self.now >= factor * self.level

    def leaves_below(self, reading: float, limit: float) -> bool:
        """Return True if the last Courant number would still be at or below a limit at the rate of now."""
        return reading * self.now <= limit * self.measured

    def state_dict(self) -> dict[str, Any]:
        """Return rates and steps."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        vars(self).update(state)
