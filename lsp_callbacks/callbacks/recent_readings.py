"""The last readings of one number, and whether they show that it is above a threshold."""

from __future__ import annotations

import math
from typing import Any


class Readings:
    """The last ``patience`` readings, with their steps.

    Args:
        patience: readings in the mean.
        patience_steps: steps after which fewer readings are enough, if none of them since was at or below the
            threshold: a budget may bring the next one thousands of steps later.
    """

    def __init__(self, patience: int, patience_steps: int):
        self.patience, self.patience_steps = patience, patience_steps
        self.steps: list[int] = []
        self.values: list[float] = []

    def __len__(self) -> int:
        return len(self.values)

    def add(self, step: int, value: float) -> None:
        """Take in a reading; NaN neither counts nor resets."""
        if not math.isnan(value):
            self.steps = [*self.steps, step][-self.patience :]
            self.values = [*self.values, value][-self.patience :]

    def drop(self) -> None:
        """Forget the latest reading."""
        self.steps, self.values = self.steps[:-1], self.values[:-1]

    @property
    def latest(self) -> float:
        """The latest reading; NaN before the first."""
        return self.values[-1] if self.values else math.nan

    @property
    def latest_step(self) -> int:
        """The step of the latest reading; -1 before the first."""
        return self.steps[-1] if self.steps else -1

    @property
    def mean(self) -> float:
        """The mean of the readings; NaN before the first."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    def above(self, threshold: float, step: int) -> float:
        """Return the mean if it is above the threshold; NaN if it is not, or if there are too few readings.

        Args:
            threshold: what it is compared with.
            step: number of the step that has just ended.
        """
        mean = self.mean if len(self) == self.patience else math.nan
        if mean > threshold:
            return mean
        lasting = [(at, value) for at, value in zip(self.steps, self.values) if value > threshold]
        unbroken = lasting[len(lasting) - self._trailing(threshold) :]
        if unbroken and step - unbroken[0][0] >= self.patience_steps:
            return sum(value for _, value in unbroken) / len(unbroken)
        return math.nan

    def _trailing(self, threshold: float) -> int:
        """Return how many readings in a row, up to the last, are above the threshold."""
        return next((k for k, value in enumerate(reversed(self.values)) if not value > threshold), len(self))

    def state_dict(self) -> dict[str, Any]:
        """Return steps and values."""
        return {"steps": list(self.steps), "values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.steps, self.values = list(state["steps"]), list(state["values"])
