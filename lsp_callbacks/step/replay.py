"""Running a training step again without leaving a trace."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import tree_map
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.batch import MicroBatch
from lsp_callbacks.step.module_copy import ModuleCopy
from lsp_callbacks.step.side_effects import muted


def copied(batch: Any) -> Any:
    """Return a deep copy, in a quick way for the usual containers of tensors."""
    return tree_map(lambda leaf: leaf.clone() if type(leaf) is Tensor else copy.deepcopy(leaf), batch)


def summed(losses: Iterable[Tensor | None]) -> Tensor | None:
    """Return the sum of the losses that are not None, in their order; None if there is none."""
    present = [loss for loss in losses if loss is not None]
    return functools.reduce(torch.add, present) if present else None


def replayer(module_copy: ModuleCopy, parts: Sequence[MicroBatch]) -> Callable[[], Tensor]:
    """Return ``() -> loss`` of a step: each call takes fresh batches, buffers and random states, and is `muted`.

    The losses of the micro-batches are summed in their order, and buffers evolve through them as they did. The graphs
    of all of them are held at once.

    Args:
        module_copy: made before the step.
        parts: the micro-batches between two updates; one without accumulation.
    """

    def replay() -> Tensor:
        losses, module = [], None
        for part in parts:
            batch = copied(part.batch)
            module = module_copy.reset() if module is None else module
            part.random_state.restore()
            with muted():
                losses.append(part.loss(module, batch))
        total = summed(losses)
        if total is None:
            raise Unmeasurable("the replayed step has no loss")
        return total.reshape(()) if total.numel() == 1 else total  # backward() takes one number in any shape

    return replay
