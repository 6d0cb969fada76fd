"""What a step has completed, until the loop takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lsp_callbacks.monitor.monitor import Monitor, Observation


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
