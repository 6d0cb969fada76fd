"""Running a training step again without leaving a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import tree_map
from lsp_callbacks.autograd.side_effects import Muter, muted, muters
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.batch import MicroBatch, batch_size, samples_between
from lsp_callbacks.step.module_copy import ModuleCopy
from lsp_callbacks.step.module_in_place import ModuleInPlace
from lsp_callbacks.step.module_modes import batch_norms
from lsp_callbacks.step.whole_copy import WholeCopy

Replay = Callable[[], Tensor]


def copied(batch: Any) -> Any:
    """Return a deep copy, in a quick way for the usual containers of tensors."""
    kind = type(batch)
    if kind is Tensor:
        return batch.clone()
    if kind is list or kind is tuple:
        return kind(map(copied, batch))
    if kind is dict:
        return {key: copied(value) for key, value in batch.items()}
    return tree_map(lambda leaf: leaf.clone() if type(leaf) is Tensor else copy.deepcopy(leaf), batch)


def replayer(module_copy: ModuleCopy | ModuleInPlace | WholeCopy, parts: Sequence[MicroBatch]) -> Callable[[], Tensor]:
    """Return ``() -> loss`` of a step: each call takes fresh batches, buffers and random states, and is `muted`.

    The losses of the micro-batches are summed in their order, and buffers evolve through them as they did. The graphs
    of all of them are held at once.

    Args:
        module_copy: made before the step.
        parts: the micro-batches between two updates; one without accumulation.
    """

    def replay() -> Tensor:
        muter = muters.get(get_ident())
        if muter is not None:
            return run(muter)
        with muted():  # outside of `untouched`, which prepares it once for all replays of a step
            return run(muters[get_ident()])

    # A function that called itself would keep itself, and the copy of the module, until a collection of cycles.
    def run(muter: Muter) -> Tensor:
        total, module = None, None
        for part in parts:
            batch = copied(part.batch)
            module = module_copy.reset() if module is None else module
            for put_back in part.random_state.setters:
                put_back()
            muter.depth += 1
            try:
                loss = part.loss(module, batch)
            finally:
                muter.depth -= 1
                if muter.folder is not None and not muter.depth:
                    muter.forget_files()
            if loss is not None:
                total = loss if total is None else total + loss
        if total is None:
            raise Unmeasurable("the replayed step has no loss")
        return total.reshape(()) if total.numel() == 1 else total  # backward() takes one number in any shape

    return replay


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
