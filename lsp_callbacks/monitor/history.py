"""What a run has measured so far: the observation of a step, and the curve of each key."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lsp_callbacks.monitor.history_table import data_frame, read_table, write_table
from lsp_callbacks.quantities.base import is_global

if TYPE_CHECKING:
    import pandas

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
    """The curves by key.

    Example:
        >>> from lsp_callbacks import Curve, History
        >>> history = History({"stability/courant": Curve([0, 50], [0.25, 0.5])})
        >>> history.save("history.csv")  # doctest: +SKIP
        >>> History.load("history.csv") == history  # doctest: +SKIP
        True
    """

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame of pandas: a row for each step at which anything was measured, a column for each key.

        Returns:
            The frame, with the index ``step``. A cell is NaN where the key was not measured at that step, and also
            where its measurement failed: the curves of this mapping hold the measurements alone.

        Raises:
            ImportError: without pandas.

        Example:
            >>> history = History({"stability/courant": Curve([0, 50], [0.25, 0.5])})
            >>> history.to_frame()["stability/courant"].max()  # doctest: +SKIP
            0.5
        """
        return data_frame({key: (curve.steps, curve.values) for key, curve in self.items()})

    def save(self, path: str | Path) -> None:
        """Write all curves to a CSV file, as Lightning's ``CSVLogger`` writes ``metrics.csv``.

        A cell is empty where a key was not measured at that step, and ``nan`` where its measurement failed. `load`
        gives the same curves again, ``lsp-callbacks report`` reads the file, and so does ``pandas.read_csv``.

        Args:
            path: of the file, ending in ``.csv``; its folder is made, a file that is there is replaced.

        Raises:
            ValueError: for another ending.
        """
        write_table(path, {key: (curve.steps, curve.values) for key, curve in self.items()})

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Return the curves of a file that `save` has written.

        Raises:
            ValueError: for a file of another kind.
        """
        return cls({key: Curve(*curve) for key, curve in read_table(path).items()})

    def add(self, observation: Observation, values: Mapping[str, float]) -> Observation:
        """Return the observation with further values, which are appended to their curves, too."""
        for key, value in values.items():
            if (curve := self.get(key)) is None:
                curve = self[key] = Curve()
            curve.steps.append(observation.step)
            curve.values.append(value)
        return Observation(observation.step, observation.values | dict(values), observation.failures)

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
