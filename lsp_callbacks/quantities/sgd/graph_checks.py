"""When rows that were read from the graph of a step are compared with a replay."""

from __future__ import annotations

import math

from lsp_callbacks.operators.sgd.gram_matrix import TangentKernel
from lsp_callbacks.operators.sgd.graph_pass import GraphKind
from lsp_callbacks.quantities.base import Quantity

#: Readings 1, 32, 1024, ... are checked.
CHECKED = 32


class ChecksGraphs(Quantity):
    """A quantity that reads the graphs of steps, and compares some of them with a replay."""

    def __init__(self) -> None:
        super().__init__()
        self._known: GraphKind | None = None
        self._checked: TangentKernel | None = None
        self._last_check = self._next_check = 1

    @property
    def _checks_next(self) -> bool:
        """Whether the next measurement is one of those that are checked."""
        return self._checks(self._update_count + 1)

    @property
    def needs_replay(self) -> bool:
        return self._known is None or self._checks_next

    def _checks(self, reading: int) -> bool:
        return self._checked is None or reading >= self._next_check

    def _is_changed(self) -> None:
        """Go back to replays, the next of which is checked; where graphs change again and again, it is put off."""
        self._known = None
        self._next_check = max(self._update_count + 1, 2 * self._last_check)

    def _is_checked(self) -> None:
        """Put off the next comparison with a replay."""
        self._last_check = self._update_count
        self._next_check = CHECKED ** (int(math.log(self._update_count + 0.5, CHECKED)) + 1)
