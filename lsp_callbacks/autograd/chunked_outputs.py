"""Outputs that a last layer computes in chunks: which position of the whole each of them belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import call, metadata
from lsp_callbacks.autograd.graph_pull import UnknownGraph
from lsp_callbacks.autograd.loss_terms import same_entries

#: Nodes that choose entries, or put them elsewhere.
_MOVES = {
    "ViewBackward0", "UnsafeViewBackward0", "SplitBackward0", "SplitWithSizesBackward0", "SliceBackward0",
    "SelectBackward0", "UnbindBackward0", "TransposeBackward0", "PermuteBackward0", "CloneBackward0", "ToCopyBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "IndexBackward0", "IndexSelectBackward0",
    "AliasBackward0", "NarrowBackward0",
}  # fmt: skip
#: Numbers are marked by digits that bfloat16 holds.
_BASE, _DIGITS = 128, 4


def linear_head(node: Any) -> Any:
    """Return the linear map that outputs come from, by a change of shape or type alone.

    Raises:
        UnknownGraph: for anything else.
    """
    head, place = same_entries(node, 0)
    if head is None or place or head.name() not in ("AddmmBackward0", "MmBackward0"):
        raise UnknownGraph("outputs in chunks come from no linear layer")
    return head


@torch.no_grad()
def chunk_places(heads: Sequence[Any]) -> tuple[list[Tensor], int]:
    """Return where in the common hidden state the rows of each chunk are, and how many rows that has.

    Args:
        heads: the linear maps of the chunks, see `linear_head`.

    Raises:
        UnknownGraph: where the chunks are not of one hidden state, each row in one of them at most.
    """
    places, origins = [], []
    for head in heads:
        rows = metadata(head)[0].shape[0]
        node, place = head.next_functions[-2]
        if node is None:
            raise UnknownGraph("outputs in chunks of inputs")
        shape = tuple(metadata(node)[place].shape)
        width = shape[-1]
        if width < _DIGITS or torch.Size(shape).numel() != rows * width:
            raise UnknownGraph("chunks of another hidden state than of rows")
        number = torch.arange(1, rows + 1)
        marks = torch.zeros(rows, width)
        for digit in range(_DIGITS):
            marks[:, digit] = number // _BASE**digit % _BASE
        g = marks.view(shape)
        while node.name() in _MOVES:
            entry = metadata(node)[place]
            outputs: list[Tensor | None] = [None] * len(metadata(node))
            outputs[place] = g.to(entry.device, entry.dtype).reshape(entry.shape)
            moved = call(node, outputs)[0]
            if moved is None:
                raise UnknownGraph(f"{node.name()} gives no gradient")
            g, (node, place) = moved, node.next_functions[0]
        origins.append((node, place, tuple(g.shape)))
        digits = g.reshape(-1, width)[:, :_DIGITS].long().cpu()
        numbers = (digits * _BASE ** torch.arange(_DIGITS)).sum(1)
        (places_of_rows,) = numbers.nonzero(as_tuple=True)
        order = torch.empty(rows, dtype=torch.long)
        if len(places_of_rows) != rows or not torch.equal(numbers[places_of_rows].sort().values, number):
            raise UnknownGraph("rows of a chunk are used more than once")
        order[numbers[places_of_rows] - 1] = places_of_rows
        places.append(order)
    shape = origins[0][2]
    total = torch.Size(shape[:-1]).numel()
    if any(origin != origins[0] for origin in origins) or len(torch.cat(places).unique()) != sum(map(len, places)):
        raise UnknownGraph("chunks of several hidden states, or that overlap")
    return places, total
