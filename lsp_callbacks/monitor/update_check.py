"""Whether the parameters are where the optimizer's step, and the user's map after it, should have moved them."""

from __future__ import annotations

from dataclasses import replace

from lsp_callbacks.operators.trajectory.proximal import Expected, expected
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.snapshot import Snapshot

MOVED = (
    "leaves the parameters elsewhere than the optimizer's step on this gradient does: what else is done to them is not "
    "known; if it maps the parameters after the plain step, pass prox=..."
)
ELSEWHERE = "the parameters after the step are not prox(step): another map, or none, was applied to them"


class UpdateCheck:
    """Compares the parameters after a measured step with the target of its update; knows of no training loop.

    If the replay failed, no target is known; a warning was already issued, and the check is skipped.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.forget()

    def forget(self) -> None:
        """Forget the target, so that nothing is compared."""
        self._expected: Expected | None = None
        self.is_awaited = False

    def awaited(self) -> None:
        """Expect a target of the step that is measured next; called on every rank, also if the measurement fails."""
        self._expected, self.is_awaited = None, True

    def expect(self, snapshot: Snapshot) -> None:
        """Compute the target of that step."""
        self._expected = expected(snapshot)

    def missed(self, *, last: bool = True) -> bool:
        """Return whether the parameters are not at the target, which is then forgotten, as it is once they are there.

        Args:
            last: whether nothing can move the parameters any more before the next forward pass.
        """
        if not self.is_awaited:
            return False
        elsewhere = self.ranks.any(lambda: self._expected is not None and not self._expected.met(), "the update")
        if elsewhere and not last:
            return False
        self.forget()
        return elsewhere


def of_whole_batch(sub_batch: Snapshot, clipping: Clipping | None) -> Snapshot:
    """Return the step of the whole batch, whose gradient the optimizer is given, from that of a sub-batch."""
    gradient = {name: p.grad for name, p in sub_batch.parameters.items()}
    return replace(sub_batch, gradient=gradient, clipping=clipping)
