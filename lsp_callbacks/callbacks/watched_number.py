"""The number by which training is ended, and the one that stands in for it where it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lsp_callbacks.callbacks.recent_readings import Readings
from lsp_callbacks.monitor.courant_source import COURANT, GD
from lsp_callbacks.monitor.history import Observation


class WatchedNumber:
    """The last readings of one number; for ``stability/courant`` also those of ``stability/courant_gd``.

    The second stands in where the first fails, or is not decided yet, and where a reading of the first cannot be
    trusted (`distrust`). The two have no mean.

    Args:
        key: global key of the number.
        patience: readings in the mean.
        patience_steps: steps after which fewer readings are enough; see `Readings`.
    """

    def __init__(self, key: str, patience: int, patience_steps: int):
        self.key, self._patience = key, (patience, patience_steps)
        self._readings, self._others = Readings(*self._patience), Readings(*self._patience)
        self._others_before = self._others
        self._stands_in = self._blind = False  # blind: what it stands in for looked calm

    def add(self, observation: Observation) -> None:
        """Take in what was measured."""
        values = observation.values
        value = values.get(self.key, math.nan)
        self._others_before = self._others
        self._readings.add(observation.step, value)
        if self.key == COURANT and math.isnan(value):
            # Not yet decided, or failing; it may also be complete some steps later.
            if COURANT in values or not len(self._readings):
                self._others.add(observation.step, values.get(GD, math.nan))
                self._stands_in = True
        elif not math.isnan(value):
            self._stands_in, self._others = False, Readings(*self._patience)
            self._blind = False

    def distrust(self, observation: Observation, threshold: float) -> None:
        """Let ``courant_gd`` stand in for a reading of a step whose loss has exploded, if that looks stable."""
        gd = observation.values.get(GD, math.nan)
        if self.key != COURANT or math.isnan(gd):
            return
        if not self._stands_in:
            self._others = self._others_before
            self._others.add(observation.step, gd)
        if self._readings.latest_step == observation.step and self._readings.latest <= threshold:
            self._readings.drop()
            self._stands_in = self._blind = True

    @property
    def readings(self) -> Readings:
        """The readings that decide."""
        return self._others if self._is_replaced else self._readings

    @property
    def _is_replaced(self) -> bool:
        return self._stands_in and len(self._others) > 0

    @property
    def is_blind(self) -> bool:
        """Whether another number decides because this one looked calm when it was not."""
        return self._blind and self._is_replaced

    @property
    def name(self) -> str:
        """The key of the number that decides."""
        return f"{GD} (in place of {self.key})" if self._is_replaced else self.key

    @property
    def values(self) -> list[float]:
        """All readings that are kept, of either number."""
        return [*self._readings.values, *self._others.values]

    def state_dict(self) -> dict[str, Any]:
        """Return the readings of both, and which of them decides."""
        return {
            "own": self._readings.state_dict(), "others": self._others.state_dict(),
            "stands_in": self._stands_in, "blind": self._blind,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._readings.load_state_dict(state["own"])
        self._others.load_state_dict(state["others"])
        self._stands_in, self._blind = state["stands_in"], state["blind"]
