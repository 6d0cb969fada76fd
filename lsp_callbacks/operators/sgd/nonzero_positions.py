"""Gradients at the positions of samples, of which those that are zero are not held."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.operators.sgd.layer_rules import Use, dense
from lsp_callbacks.operators.sgd.reused_block import Block
from lsp_callbacks.operators.sgd.some_units import Units

#: Share of the positions up to which they are held alone: below it a copy of them is worth its time.
SOME = 0.75


@dataclass(frozen=True)
class NonzeroPositions:
    """Gradients ``(n, T, o)``, of which the positions are held at which they are not zero.

    What one position returns depends through causal attention on those before it alone, and behind the last attention
    on no other: more than half of the gradients at a transformer's layers are zero.

    Attributes:
        values: ``(m, o)``.
        place: of each among the ``n T`` positions, ``(m,)``.
        shape: ``(n, T)``.
    """

    values: Tensor
    place: Tensor
    shape: tuple[int, int]

    def whole(self, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return some columns with all positions, ``(n, T, b)``."""
        some = self.values[:, columns]
        held = some.new_zeros(self.shape[0] * self.shape[1], some.shape[1])
        return held.index_copy_(0, self.place, some).unflatten(0, self.shape)

    def sum(self) -> Tensor:
        """Return the sum over positions, ``(n, o)``."""
        total = self.values.new_zeros(self.shape[0], self.values.shape[1])
        return total.index_add_(0, self.place // self.shape[1], self.values)


def nonzero_positions(g: Tensor) -> Tensor | NonzeroPositions:
    """Return gradients, ``(n, T, o)``, without the positions at which they are zero, where those are many."""
    flat = g.flatten(0, 1)
    place = (flat != 0).any(1).nonzero().flatten()
    if len(place) > SOME * len(flat):
        return g
    return NonzeroPositions(flat[place], place, (g.shape[0], g.shape[1]))


def uses_at_positions(
    a: Tensor, passes: Sequence[Tensor | NonzeroPositions], *, transposed: bool = False
) -> dict[str, Use]:
    """Return how a linear map uses its weight and its bias, as `linear_uses` does: the same numbers.

    Args:
        a: the inputs, ``(n, T, i)``.
        passes: the gradients at the output, ``(n, T, o)``, of each of R rows.
        transposed: whether the matrix is ``(i, o)``.
    """
    order = "nrto,nti->nrio" if transposed else "nrto,nti->nroi"

    def stacked(columns: slice | Tensor = slice(None)) -> Tensor:
        wholes = [g[..., columns] if isinstance(g, Tensor) else g.whole(columns) for g in passes]
        return wholes[0][:, None] if len(wholes) == 1 else torch.stack(wholes, dim=1)

    @functools.cache  # the matrix is formed block by block, and then let go of with its use
    def of_all() -> Tensor:
        return stacked()

    def entries(lo: int, hi: int, block: Block) -> Tensor:
        if transposed:
            return block.product(order, of_all(), a[..., lo // width : hi // width])
        return block.product(order, stacked(slice(lo // width, hi // width)), a)

    def sizes() -> tuple[Tensor, Tensor]:
        held = [(g if isinstance(g, Tensor) else g.values).flatten(0, -2).square().sum(0) for g in passes]
        of_g, of_a = torch.stack(held).sum(0), a.flatten(0, 1).square().sum(0)
        return (of_a, of_g) if transposed else (of_g, of_a)

    def at_units(index: Tensor) -> Tensor:
        at = (of_all(), a[..., index]) if transposed else (stacked(index), a)
        return torch.einsum(order, *at).flatten(2)

    first = passes[0]
    width = (first.shape if isinstance(first, Tensor) else first.values.shape)[-1] if transposed else a.shape[-1]
    weight = Use(
        lambda lo, hi: torch.einsum(order, stacked()[lo:hi], a[lo:hi]).flatten(2),
        len(passes), entries=entries, width=width, units=Units(sizes, at_units),
    )  # fmt: skip
    bias = torch.stack([g.sum(1) if isinstance(g, Tensor) else g.sum() for g in passes], dim=1)
    return {"weight": weight, "bias": dense(bias)}
