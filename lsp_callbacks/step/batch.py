"""Batches of a step: their size, their copies, and what it takes to run a micro-batch again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import tree_map
from lsp_callbacks.autograd.side_effects import RandomState, TorchRandomState


@dataclass
class MicroBatch:
    """One forward pass of a step, with all that it takes to run it again.

    Attributes:
        batch: as the step received it; copied before each use.
        loss: ``(module, batch) -> scalar``, as it is differentiated: under accumulation already divided. It returns
            None for a forward pass without a loss.
        random_state: taken before it.
        step_loss: the loss that the step had; None if it was not observed.
    """

    batch: Any
    loss: Callable[[nn.Module, Any], Tensor | None]
    random_state: TorchRandomState = field(default_factory=RandomState)
    step_loss: Tensor | None = None


def batch_size(batch: Any) -> int | None:
    """Return the first axis of the first tensor that has one, in lists, mappings and dataclasses.

    Lightning's rule (``extract_batch_size``) except that a tensor without an axis is no batch of one.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    parts: Iterable[Any] = ()
    if isinstance(batch, list | tuple):
        parts = batch
    elif is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    elif isinstance(batch, Mapping):
        parts = batch.values()
    for part in parts:
        if (size := batch_size(part)) is not None:
            return size
    return None


def samples_between(batch: Any, begin: int, end: int) -> Any:
    """Return some samples of a batch: of all tensors whose first axis is as long as the batch."""
    size = batch_size(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[begin:end] if value.ndim and len(value) == size else value
        if is_dataclass(value) and not isinstance(value, type):
            shorter = copy.copy(value)
            for entry in fields(value):
                object.__setattr__(shorter, entry.name, tree_map(cut, getattr(value, entry.name)))
            return shorter
        if isinstance(value, Mapping):  # of another kind than those that `tree_map` looks into
            return type(value)({key: tree_map(cut, item) for key, item in value.items()})  # type: ignore[call-arg]
        return value

    return tree_map(cut, batch)
