"""Whether the weights come to where the step and the user's map should have brought them."""

from __future__ import annotations

from lsp_callbacks.operators.trajectory.proximal import Expected, expected
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.snapshot import Snapshot

MOVED = (
    "leaves the parameters elsewhere than the optimizer's step on this gradient does: what else is done to them is not "
    "known; if it maps the weights after the plain step, pass prox=..."
)
ELSEWHERE = "the parameters after the step are not prox(step): another map, or none, was applied to them"


class Destination:
    """Where a measured step should leave the parameters, until somebody has looked; knows of no training loop.

    Where it could not be told, as the step could not be replayed, that was said: it proves no other map.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.forget()

    def forget(self) -> None:
        """Nothing is awaited."""
        self._expected: Expected | None = None
        self.is_awaited = False

    def awaited(self) -> None:
        """A step that promises one begins to be measured; called on every rank, also where the measurement fails."""
        self._expected, self.is_awaited = None, True

    def expect(self, snapshot: Snapshot) -> None:
        """What that step promises."""
        self._expected = expected(snapshot)

    def missed(self, *, last: bool = True) -> bool:
        """Whether the parameters are elsewhere; then, and once they are there, nothing is awaited any more.

        Args:
            last: nothing comes any more before the next forward pass; otherwise they may still be moved there.
        """
        if not self.is_awaited:
            return False
        elsewhere = self.ranks.any(lambda: self._expected is not None and not self._expected.met(), "the update")
        if elsewhere and not last:
            return False
        self.forget()
        return elsewhere
