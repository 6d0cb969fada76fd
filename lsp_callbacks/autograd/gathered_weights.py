"""Weights that an autograd graph has saved, and that are spread over processes again after the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import gathered_parameters
from lsp_callbacks.autograd.graph import leaf_of
from lsp_callbacks.autograd.spread_tensors import sharded_modules

#: Nodes between a parameter and the operation that uses it, which have one input and change its shape or type alone.
_ON_THE_WAY = {
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0",
    "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "ExpandBackward0", "SelectBackward0",
    "SliceBackward0", "AliasBackward0", "DetachBackward0",
}  # fmt: skip
#: What needs no weights for its backward pass.
_WITHOUT = {"EmbeddingBackward0", *_ON_THE_WAY}


class GatheredWeights:
    """Gathers the weights of a module of ``fully_shard`` where a graph is read, and spreads them again.

    Its graph holds the memory of the whole weights, which is empty between the passes. All processes have to come to
    the same nodes in the same order.

    Args:
        module: after a forward pass.

    Attributes:
        shards: the parameters of the module by the ids of the whole ones, which the graph has as its leaves.

    Memory: the weights of one module to which ``fully_shard`` was applied. Cost: they are sent to all processes.
    """

    def __init__(self, module: nn.Module):
        self.shards: dict[int, Tensor] = {}
        self._owners: dict[int, Any] = {}
        for child in sharded_modules(module):
            for shard, gathered in gathered_parameters(child):
                self.shards[id(gathered)], self._owners[id(gathered)] = shard, child
        self._held: list[Any] = []

    def need(self, node: Any) -> None:
        """Gather the weights that the backward pass of a node uses, in place of those of the node before."""
        if node.name() in _WITHOUT:
            return
        owners = [self._owners[id(leaf)] for leaf in _leaves(node) if id(leaf) in self._owners]
        if not owners or all(any(owner is held for held in self._held) for owner in owners):
            return
        self.release()
        for owner in owners:
            if not any(owner is held for held in self._held):
                self._held.append(owner)
                owner.unshard()

    def release(self) -> None:
        """Spread the weights again that are held."""
        while self._held:
            self._held.pop().reshard()


def _leaves(node: Any) -> Iterator[Tensor]:
    """Yield the leaves that are arguments of an operation."""
    for child, _ in node.next_functions:
        while child is not None and child.name() in _ON_THE_WAY:
            child = child.next_functions[0][0]
        if child is not None and (leaf := leaf_of(child)) is not None:
            yield leaf
