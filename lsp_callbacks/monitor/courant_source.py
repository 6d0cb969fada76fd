"""Which Courant number is ``stability/courant``: one for a whole run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

COURANT, SOURCE = "stability/courant", "stability/courant_source"
MEAN_SQUARE, SGD, GD = (f"stability/courant_{of}" for of in ("mean_square", "sgd", "gd"))
#: Those that it can be, the best first.
PREFERENCE = (MEAN_SQUARE, SGD, GD)
#: What ``stability/courant_source`` says: loggers take numbers only.
CODES = {GD: 0.0, SGD: 1.0, MEAN_SQUARE: 2.0}


class CourantSource:
    """Decides once, before the first value, which Courant number ``stability/courant`` is.

    The headline metric is ``courant_mean_square`` if that can be measured, otherwise ``courant_sgd``, otherwise
    ``courant_gd``: one for the whole run. One that is not asked for, is skipped, or fails at its first measurement
    gives way to the next; while it is still to come there is no headline metric. If the chosen one fails later, or is
    skipped, the headline metric is NaN until it is measured again. It never becomes another one: they differ by
    factors.

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
        self._waiting: dict[str, tuple[int, float]] = {}  # by key, what was measured before the decision

    @property
    def name(self) -> str | None:
        """The key without its prefix: "courant_mean_square", say; None before the decision."""
        return None if self.key is None else self.key.removeprefix("stability/")

    def value(self, step: int, values: Mapping[str, float], possible: Collection[str]) -> tuple[int, float] | None:
        """Return the step at which the headline metric was measured, and its value; None if there is no new one.

        Args:
            step: number of the optimizer step.
            values: what it has completed, NaN for what failed.
            possible: keys that can be measured in this run.

        The step is an earlier one only if the decision comes after the measurement of a key, because only then a better
        one has shown that it cannot be measured.
        """
        if self.key is None:
            self._waiting |= {key: (step, values[key]) for key in PREFERENCE if key in values}
            for key in PREFERENCE:
                measured = self._waiting.get(key)
                if key == GD:
                    is_chosen = key in possible or measured is not None
                elif measured is None and key in possible:
                    return None
                else:
                    is_chosen = measured is not None and not math.isnan(measured[1])
                if is_chosen:
                    self.key, self._waiting = key, {}
                    return measured
            return None
        if self.key not in values:
            is_skipped = self.key not in possible
            self.failing = self.failing or is_skipped
            # Otherwise an old reading would look current, while another metric goes on.
            return (step, math.nan) if is_skipped and any(key in values for key in PREFERENCE) else None
        self.failing = math.isnan(values[self.key])
        return step, values[self.key]

    def invalidate(self, keys: Collection[str]) -> set[str]:
        """Return the keys that depend on these, which are not valid, as the step moved the parameters otherwise.

        Args:
            keys: of the step's values.
        """
        self._waiting = {
            key: (step, math.nan if key in keys else value) for key, (step, value) in self._waiting.items()
        }
        return {COURANT, SOURCE} if self.key in keys else set()

    def keys(self, possible: Collection[str], *, without_update: bool) -> set[str]:
        """Return the keys of the headline metric, if it can appear.

        Args:
            possible: keys that can be measured in this run.
            without_update: whether the update turned out not to be the optimizer's.
        """
        appears = set(PREFERENCE) & set(possible) or (self.key and not without_update)
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
        return {"key": self.key, "failing": self.failing, "waiting": dict(self._waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.key, self.failing = state["key"], bool(state["failing"])
        self._waiting = {key: tuple(measured) for key, measured in state["waiting"].items()}
