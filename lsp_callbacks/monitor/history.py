"""What a run has measured so far: the observation of a step, and the curve of each key."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lsp_callbacks.quantities.base import is_global

#: How many points of each global curve a checkpoint carries.
SAVED = 1000


@dataclass(frozen=True)
class Observation:
    """What one step has completed.

    Attributes:
        step: number of the optimizer step.
        values: by key; NaN for a measurement that failed.
        failures: the reason, by quantity.
    """

    step: int
    values: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)

    def joined(self, other: Observation) -> Observation:
        """Return this and another observation of the same step as one."""
        return Observation(self.step, self.values | other.values, self.failures | other.failures)


@dataclass
class Curve:
    """One key over time."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class History(dict[str, Curve]):
    """The curves by key."""

    def add(self, observation: Observation, values: Mapping[str, float]) -> Observation:
        """Return the observation with further values, which are appended to their curves, too."""
        for key, value in values.items():
            curve = self.setdefault(key, Curve())
            curve.steps.append(observation.step)
            curve.values.append(value)
        return replace(observation, values=observation.values | dict(values))

    def replace(self, curves: Mapping[str, Curve]) -> None:
        """Forget the curves, and take others."""
        self.clear()
        self.update(curves)

    def invalidate(self, keys: Collection[str]) -> None:
        """Replace the last value of these curves by NaN."""
        for key in keys:
            self[key].values[-1] = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the last points of the global curves, as tensors."""
        return {
            key: {
                "steps": torch.tensor(curve.steps[-SAVED:]),
                "values": torch.tensor(curve.values[-SAVED:], dtype=torch.float64),
            }
            for key, curve in self.items()
            if is_global(key)
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Return the curves that `state_dict` has saved."""
        return cls({key: Curve(curve["steps"].tolist(), curve["values"].tolist()) for key, curve in state.items()})


def scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return the finite global values: callbacks that stop at a NaN may see these."""
    return {key: value for key, value in values.items() if is_global(key) and math.isfinite(value)}
