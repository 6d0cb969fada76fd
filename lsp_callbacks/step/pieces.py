"""The loss of a step as a sum over pieces of its batch, each of which takes less memory than the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from lsp_callbacks.step.batch import MicroBatch, batch_size, samples_between
from lsp_callbacks.step.module_copy import ModuleCopy
from lsp_callbacks.step.module_in_place import ModuleInPlace
from lsp_callbacks.step.module_modes import batch_norms
from lsp_callbacks.step.replay import replayer
from lsp_callbacks.step.whole_copy import WholeCopy

Replay = Callable[[], Tensor]


@dataclass(frozen=True)
class DividedReplay:
    """``() -> loss`` of a step, as `replayer` has it, that can also be made piece by piece.

    Args:
        module_copy: made before the step.
        parts: the micro-batches between two updates.
    """

    module_copy: ModuleCopy | ModuleInPlace | WholeCopy
    parts: Sequence[MicroBatch]

    def __call__(self) -> Tensor:
        return replayer(self.module_copy, self.parts)()

    def pieces(self, count: int) -> list[Replay]:
        """Return replays of pieces of each micro-batch, each times its share of the samples: their sum is a loss.

        It is the step's own loss where that is a mean over samples that do not depend on each other, and nothing is
        drawn at random: the caller compares it, and its gradient. Empty where statistics of the batch tie samples
        together, or the batch has no samples to be seen.

        Args:
            count: how many of each micro-batch, at most.
        """
        if batch_norms(self.module_copy.module):
            return []
        replays: list[Replay] = []
        for part in self.parts:
            size = batch_size(part.batch) or 0
            if size < 2:
                return []
            bounds = [round(size * k / count) for k in range(count + 1)]
            pairs = ((lo, hi) for lo, hi in pairwise(bounds) if lo < hi)
            replays += [replayer(self.module_copy, [_piece(part, lo, hi, size)]) for lo, hi in pairs]
        return replays


def _piece(part: MicroBatch, lo: int, hi: int, size: int) -> MicroBatch:
    def loss(module: nn.Module, batch: object) -> Tensor | None:
        mean = part.loss(module, batch)
        return None if mean is None else mean * ((hi - lo) / size)

    return replace(part, batch=samples_between(part.batch, lo, hi), loss=loss)
