"""Which Courant number is ``stability/courant``: one for a whole run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

COURANT, SOURCE = "stability/courant", "stability/courant_source"
SGD, GD = "stability/courant_sgd", "stability/courant_gd"
#: What ``stability/courant_source`` says: loggers take numbers only.
CODES = {GD: 0.0, SGD: 1.0}


class CourantSource:
    """Decides once, before the first value, whether ``stability/courant`` is ``courant_sgd`` or ``courant_gd``.

    The headline metric is ``courant_sgd`` if that can be measured; while its probes are collected there is none. It is
    ``courant_gd`` for the whole run if the other is not asked for, is skipped, or fails at its first measurement. If
    the chosen one fails later, or is skipped, the headline metric is NaN until it is measured again. It never becomes
    the other one: the two differ by factors.

    Attributes:
        key: the chosen key; None before the decision.
        failing: whether the last measurement of the chosen key failed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.key: str | None = None
        self.failing = False
        self._waiting: tuple[int, float] | None = None

    @property
    def name(self) -> str | None:
        """The key without its prefix: "courant_sgd" or "courant_gd"; None before the decision."""
        return None if self.key is None else self.key.removeprefix("stability/")

    def value(self, step: int, values: Mapping[str, float], possible: Collection[str]) -> tuple[int, float] | None:
        """Return the step at which the headline metric was measured, and its value; None if there is no new one.

        Args:
            step: number of the optimizer step.
            values: what it has completed, NaN for what failed.
            possible: keys that can be measured in this run.

        The step is an earlier one only if the decision is made after the measurement of ``courant_gd``, because only
        the collected probes have shown that the other key cannot be measured.
        """
        if self.key is None and GD in values:
            self._waiting = (step, values[GD])
        if self.key is None:
            if SGD in possible and SGD not in values:
                return None
            sgd = values.get(SGD, math.nan)
            self.key = GD if math.isnan(sgd) else SGD
            waiting, self._waiting = self._waiting, None
            if self.key == GD:
                self.key = GD if GD in possible or waiting is not None else None
                return waiting
        if self.key not in values:
            is_skipped = self.key not in possible
            self.failing = self.failing or is_skipped
            # Otherwise an old reading would look current, while the other metric goes on.
            return (step, math.nan) if is_skipped and GD in values else None
        self.failing = math.isnan(values[self.key])
        return step, values[self.key]

    def invalidate(self, keys: Collection[str]) -> set[str]:
        """Return the keys that depend on these, which are not valid, as the step moved the parameters otherwise.

        Args:
            keys: of the step's values.
        """
        if GD in keys and self._waiting is not None:
            self._waiting = (self._waiting[0], math.nan)
        return {COURANT, SOURCE} if self.key in keys else set()

    def keys(self, possible: Collection[str], *, without_update: bool) -> set[str]:
        """Return the keys of the headline metric, if it can appear.

        Args:
            possible: keys that can be measured in this run.
            without_update: whether the update turned out not to be the optimizer's.
        """
        appears = {SGD, GD} & set(possible) or (self.key and not without_update)
        return {COURANT, SOURCE} if appears else set()

    def reported(self, value: float) -> dict[str, float]:
        """Return the headline metric by its key, and which it is, unless it is NaN."""
        source = {} if self.key is None or math.isnan(value) else {SOURCE: CODES[self.key]}
        return {COURANT: value} | source

    def reading(self, values: Mapping[str, float]) -> float:
        """Return the headline metric, or ``courant_gd`` before the decision and while it fails; NaN without either."""
        value = values.get(self.key or COURANT, math.nan)
        return values.get(GD, math.nan) if math.isnan(value) and (self.key is None or self.failing) else value

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and names only."""
        return {"key": self.key, "failing": self.failing, "waiting": self._waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.key, self.failing = state["key"], bool(state["failing"])
        self._waiting = None if state["waiting"] is None else tuple(state["waiting"])
