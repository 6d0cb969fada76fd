"""Which quantities are measured at a step: those that start, go on, or were postponed until now."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from lsp_callbacks.monitor.cadence import Cadence


class Schedule:
    """Which quantities are measured at a step.

    Each of them starts where the cadence says so. A measurement that takes several steps is under way until it is
    complete. One that starts before enough is known is postponed.

    Args:
        cadence: at which steps measurements start.

    Attributes:
        under_way: names of the quantities whose measurement has begun and is not complete.
    """

    def __init__(self, cadence: Cadence):
        self.cadence = cadence
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.cadence.reset()
        self.under_way: set[str] = set()

    @property
    def postponed(self) -> dict[str, int]:
        """Return the quantities that wait, and the step from which on they need not wait any more."""
        paces = self.cadence.paces.items()
        return {name: pace.postponed for name, pace in paces if pace.postponed is not None}

    def starting(self, step: int, scheduled: float = math.nan) -> tuple[str, ...]:
        """Return the quantities whose measurements start at this step.

        Args:
            step: number of the optimizer step.
            scheduled: learning rate of this step over the critical one, if the caller knows it.
        """
        names = self.cadence.starting(step, scheduled=scheduled, busy=self.under_way)
        return tuple(name for name in names if name not in self.under_way)

    def is_due(self, step: int, scheduled: float = math.nan) -> bool:
        """Return whether anything is measured at this step; for the arguments see `starting`."""
        return bool(self.cadence.starting(step, scheduled=scheduled, busy=self.under_way) or self.under_way)

    def is_complete(self, step: int, *, within: int = 0) -> bool:
        """Return True if no measurement is under way, and none is postponed to ``within`` the next steps.

        Args:
            step: that was observed last.
            within: a number of steps.
        """
        return not self.under_way and all(later - step > within for later in self.postponed.values())

    def postpone(self, name: str, step: int) -> None:
        """Let a quantity wait until a step."""
        self.cadence.postpone(name, step)

    def begin(self, name: str) -> None:
        """Take a quantity for this step; it is not under way any more unless `go_on` is called."""
        self.under_way.discard(name)

    def go_on(self, name: str) -> None:
        """Measure a quantity at the next step, too: it is not complete."""
        self.under_way.add(name)

    def interrupt(self) -> None:
        """Break off what is under way; what is due may begin anew at the same step."""
        self.under_way.clear()
        self.cadence.choose_again()

    def drop(self, name: str) -> None:
        """Forget a quantity that is not measured any more."""
        self.begin(name)
        self.cadence.drop(name)

    def state_dict(self) -> dict[str, Any]:
        """Return names and numbers."""
        return {"cadence": self.cadence.state_dict(), "under_way": sorted(self.under_way)}

    def load_state_dict(self, state: dict[str, Any], *, names: Collection[str], windows: bool) -> None:
        """Continue from a state.

        Args:
            state: that `state_dict` returned.
            names: of the quantities that are measured now.
            windows: whether measurements that were under way can go on; otherwise they begin anew at the next step.
        """
        self.cadence.load_state_dict(state["cadence"])
        under_way = {name for name in state["under_way"] if name in names}
        self.under_way = under_way if windows else set()
        for name in under_way - self.under_way:
            self.cadence.restart(name)
