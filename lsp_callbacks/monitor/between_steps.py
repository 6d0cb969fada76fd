"""Whether the weights are moved between an optimizer's step and the next batch: clipped, averaged, tied by hand."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lsp_callbacks.autograd._torch_internals import first_after_step
from lsp_callbacks.autograd.spread_tensors import local_parts
from lsp_callbacks.step.fingerprint import fingerprint, identical, in_one
from lsp_callbacks.step.run_context import RunContext

if TYPE_CHECKING:
    from lsp_callbacks.monitor.monitor import Monitor

MOVED_BETWEEN = (
    "the weights are moved between the optimizer's step and the next batch (clipping, an average that is copied back, "
    "weights tied by hand, in a hook or a callback), and what moves them is not known: pass it as prox=... if it maps "
    "the parameters after each step"
)
#: So many of the last comparisons have to find moved weights: a single return to earlier weights is no map.
OFTEN, OF = 2, 10


class BetweenSteps:
    """Compares the weights as an optimizer's measured step has left them with those at the next batch.

    Once they have been moved, the step that follows is looked at, too, whether it is measured or not: a map of every
    step is known as such one step later. What happens once, or between two epochs, is no part of the training map, but
    ends the windows under way.

    Args:
        monitor: that measures.

    Attributes:
        is_awaited: whether weights are compared at the next batch.
        looks_again: whether the next step is to be looked at.
    """

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._handle: RemovableHandle | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything, as before a run."""
        self.forget()
        self.looks_again = False
        self._moves: deque[bool] = deque(maxlen=OF)

    def forget(self) -> None:
        """Compare nothing at the next batch."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.is_awaited = None, False
        self._left: Tensor | None = None  # by the step
        self._weights: list[Tensor] = []

    @property
    def is_under_way(self) -> bool:
        """Whether the step under way, or the one that comes next, is looked at."""
        return self.is_awaited or self.looks_again

    def follow(self, optimizer: torch.optim.Optimizer, run: RunContext) -> None:
        """Look at the weights after the step that this optimizer makes next; called on every rank.

        A map that the user has named (``prox``) is compared by `UpdateCheck`, and what is no longer said needs nothing.
        """
        monitor, self.looks_again = self._monitor, False
        if self.is_awaited or run.prox is not None or monitor.invalidated is not None:
            return
        if not any(quantity.needs_update for quantity in monitor.quantities.values()):
            return
        self.is_awaited, self._ranks = True, run.ranks
        self._weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._handle = first_after_step(optimizer, self._note)

    def _note(self, *_: Any) -> None:
        with self._monitor.errors.warn_instead_of_raise("the weights after the step could not be noted"):
            self._left = self._sums()

    def _sums(self) -> Tensor:
        return in_one([number.reshape(1) for number in fingerprint(local_parts(self._weights))])

    def finds_a_map(self, *, is_epoch_over: bool) -> bool:
        """Return whether the weights have been moved, on any rank, so often that this belongs to the training map.

        Args:
            is_epoch_over: whether an epoch has ended since the step.
        """

        def differ() -> bool:
            return self._left is not None and not identical([self._sums()], [self._left])

        is_moved = False
        with self._monitor.errors.warn_instead_of_raise("the weights at the next batch could not be compared"):
            is_moved = self._ranks.any(differ, "the weights at the next batch")
        self.forget()
        if is_moved:
            self._monitor.drop()
        if is_epoch_over:
            return False
        self._moves.append(is_moved)
        is_map = sum(self._moves) >= OFTEN
        self.looks_again = is_moved and not is_map
        return is_map
