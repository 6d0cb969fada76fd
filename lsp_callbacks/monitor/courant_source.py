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

    It is the stochastic one if that can be measured; while its probes are collected there is no headline number. It is
    the one of full-batch steps for the whole run where the other is not asked for, is left out, or fails at its first
    measurement. Where the chosen one fails later, or is given up, the headline number is NaN; when it is back, it goes
    on. It never becomes the other one: the two differ by factors.

    Attributes:
        key: the key that it is; None before the decision.
        failing: whether the last measurement of the chosen one failed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As before a first run."""
        self.key: str | None = None
        self.failing = False
        self._waiting: tuple[int, float] | None = None

    @property
    def name(self) -> str | None:
        """The key without its prefix: "courant_sgd" or "courant_gd"; None before the decision."""
        return None if self.key is None else self.key.removeprefix("stability/")

    def value(self, step: int, values: Mapping[str, float], possible: Collection[str]) -> tuple[int, float] | None:
        """The headline number that a step has brought, with the step at which it was measured; None if it brought none.

        Args:
            step: of the optimizer.
            values: what it has completed, NaN where it failed.
            possible: keys that can be measured in this run.

        The second number is that of an earlier step only where the decision falls after the measurement of
        ``courant_gd``, because only the collected probes have shown that the other one cannot be had.
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
            given_up = self.key not in possible
            self.failing = self.failing or given_up
            # Otherwise an old reading would stand for the present, while the other number goes on.
            return (step, math.nan) if given_up and GD in values else None
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
        """Return the keys of the headline number, if it can appear.

        Args:
            possible: keys that can be measured in this run.
            without_update: whether the update turned out not to be the optimizer's.
        """
        appears = {SGD, GD} & set(possible) or (self.key and not without_update)
        return {COURANT, SOURCE} if appears else set()

    def reported(self, value: float) -> dict[str, float]:
        """Return the headline number by its key, and which it is, unless it is NaN."""
        source = {} if self.key is None or math.isnan(value) else {SOURCE: CODES[self.key]}
        return {COURANT: value} | source

    def reading(self, values: Mapping[str, float]) -> float:
        """The headline number; before it is decided and while it fails, what stands in for it; NaN without either."""
        value = values.get(self.key or COURANT, math.nan)
        return values.get(GD, math.nan) if math.isnan(value) and (self.key is None or self.failing) else value

    def state_dict(self) -> dict[str, Any]:
        """Numbers and names only."""
        return {"key": self.key, "failing": self.failing, "waiting": self._waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self.key, self.failing = state["key"], bool(state["failing"])
        self._waiting = None if state["waiting"] is None else tuple(state["waiting"])
