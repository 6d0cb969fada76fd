"""Hessian products by differences of gradients where each process holds a shard of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import trained_parameters
from lsp_callbacks.autograd.spread_tensors import part_of_whole
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.linalg.vector_parts import VectorParts
from lsp_callbacks.operators.curvature.finite_differences import Differences, difference_hessian
from lsp_callbacks.operators.curvature.gradient_difference import Products
from lsp_callbacks.step.flat import displaced_gradient
from lsp_callbacks.step.snapshot import Snapshot


class ShardDifferences(Differences):
    """Differences of gradients at shards: a process moves its own, and all add up inner products and norms.

    Cost: as `Differences`, and an all-reduce of a few numbers for each inner product.
    """

    def __init__(self, snapshot: Snapshot, gradient: Tensor, weight: Tensor | float = 1.0, *, relative: bool = True):
        self.parts = vector_parts(snapshot)
        self._originals = list(trained_parameters(snapshot.module).values())
        super().__init__(snapshot, gradient, weight, relative=relative)

    def _whole(self) -> Sequence[Tensor]:
        return self._originals

    @cached_property
    def _numbers(self) -> float:
        return float(sum(p.numel() for p in self._originals))

    def _count(self) -> float:
        return self._numbers

    def _sums(self, values: list[float]) -> list[float]:
        return self.parts.total(torch.tensor(values, dtype=torch.float64)).tolist()

    def _dots(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*self.parts.total(torch.stack([torch.dot(a, b) for a, b in pairs]))]

    def _norms(self, parts: Sequence[Tensor], order: float = 2.0) -> list[float]:
        if order == math.inf:
            largest = [float(part.abs().amax()) if part.numel() else 0.0 for part in parts]
            return [max(values) for values in zip(*self.snapshot.run.ranks.gather(lambda: largest, "largest numbers"))]
        sizes = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts]
        return [square**0.5 for square in self._sums([size**2 for size in sizes])]

    def _norm(self, v: Tensor) -> float:
        return self._norms([v])[0]

    def _moved(self, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        snapshot = self.snapshot
        rise, loss, gradient = displaced_gradient(snapshot.replay, self.parameters, self.start, v, scale, snapshot.loss)
        rise, loss = snapshot.run.ranks.mean(lambda: (rise.double(), loss.double()), "the displaced loss")
        return rise, loss, gradient  # of the mean over the processes already


def vector_parts(snapshot: Snapshot) -> VectorParts:
    """Return how flat vectors over the parameters of a step with shards lie on the processes.

    Raises:
        Unsupported: where some numbers lie on more processes than others.
    """
    shards, ranks, originals = snapshot.run.shards, snapshot.run.ranks, trained_parameters(snapshot.module)
    assert shards is not None
    copies = set(shards.copies.values())
    if len(copies) > 1:
        raise Unsupported("some parameters lie on more processes than others: sums over all of them are not modelled")
    factor = ranks.world / copies.pop()

    def total(sums: Tensor) -> Tensor:
        (mean,) = ranks.mean(lambda: (sums.double().to(ranks.device),), "inner products")
        return (factor * mean).to(sums.device)

    def part(between: Callable[[int, int], Tensor]) -> Tensor:
        pieces, at = [], 0
        for p in originals.values():
            numbers = between(at, at + p.numel()).view(p.shape).to(p.device)
            pieces.append(part_of_whole(numbers, p).reshape(-1))
            at += p.numel()
        return torch.cat(pieces)

    return VectorParts(sum(p.numel() for p in snapshot.parameters.values()), total, part)


def shard_hessian(
    step: Snapshot, products: Products, weight: Tensor | float, *, relative: bool = True
) -> LinearOperator:
    """Return the Hessian of a step on this process's part of the vectors, from passes of the sharded module itself.

    Args:
        step: with shards, and a replay without kinks.
        products: the record of the step's products.
        weight, relative: see `Differences`.

    Raises:
        Unmeasurable: without the step's gradient, and where a difference cannot be trusted, as there are no exact
            products.

    Cost: one gradient for each product. Memory: copies of the shards, once, and vectors of the shards' size.
    """
    gradient = step.flat_gradient
    if gradient is None:
        raise Unmeasurable("finite differences start from the step's gradient: pass gradient=... to the Snapshot")
    differences = ShardDifferences(step, gradient, weight, relative=relative)
    H = difference_hessian(differences, products, None)
    n = sum(p.numel() for p in trained_parameters(step.module).values())
    return LinearOperator((n, n), H.apply, H.apply, dtype=H.dtype, device=H.device, parts=differences.parts)
