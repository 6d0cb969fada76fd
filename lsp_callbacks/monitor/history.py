"""What a run has measured so far: the observation of a step, the curve of each key, and what a step has completed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lsp_callbacks.monitor.history_table import data_frame, read_table, write_table
from lsp_callbacks.quantities.base import is_global

if TYPE_CHECKING:
    import pandas

    from lsp_callbacks.monitor.monitor import Monitor

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


class Completed(NamedTuple):
    """What the last step has completed.

    Attributes:
        observations: of measurements; of several optimizers that take turns, of each.
        fault: the step of the run's first NaN or Inf, as an observation, if it was this one.
    """

    observations: Sequence[Observation]
    fault: Observation | None


NOTHING = Completed([], None)


class StepResults:
    """Observations of the step under way, and of the one before, whose update may turn out to be another one.

    Args:
        monitor: that made the observations.

    Attributes:
        taken: the observation that was taken last, until it is known that its update was right.
    """

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self.forget()

    def forget(self) -> None:
        """Forget all, as before a run."""
        self._observations: list[Observation] = []
        self._fault: Observation | None = None
        self.taken: Observation | None = None

    def add(self, observation: Observation | None) -> None:
        """Take in what the monitor has observed, if anything was completed; of one step it becomes one observation."""
        if observation is None:
            return
        if self._observations and self._observations[-1].step == observation.step:
            observation = self._observations.pop().joined(observation)
        self._observations.append(observation)

    def add_fault(self, step: int) -> None:
        """Take in the step of the run's first NaN or Inf."""
        self._fault = self._monitor.history.add(Observation(step, {}), {"stability/nonfinite_step": float(step)})

    def invalidate_update(self, reason: str) -> None:
        """Turn the last step's numbers that depend on the update into NaN, and measure none of them any more."""
        observations, self._observations = self._observations, []
        last = observations[0] if observations else self.taken
        corrected = self._monitor.invalidate_update_metrics(last, reason)
        if observations:
            self.add(corrected)

    def take(self) -> Completed:
        """Return what was completed since the last call."""
        if not self._observations and self._fault is None:
            return NOTHING
        completed = Completed(self._observations, self._fault)
        if completed.observations:
            self.taken = completed.observations[-1]
        self._observations, self._fault = [], None
        return completed
