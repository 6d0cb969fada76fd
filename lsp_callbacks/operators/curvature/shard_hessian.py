"""Hessian products by differences of gradients where each process holds a shard of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import trained_parameters
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.difference_hessian import difference_hessian
from lsp_callbacks.operators.curvature.finite_differences import Differences
from lsp_callbacks.operators.curvature.gradient_difference import Products
from lsp_callbacks.operators.parts_of_shards import parts_of_shards, shares_of
from lsp_callbacks.step.flat import displaced_gradient
from lsp_callbacks.step.snapshot import Snapshot, computed_once


class ShardDifferences(Differences):
    """Differences of gradients at shards: a process moves its own, and all add up inner products and norms.

    Cost: as `Differences`, and an all-reduce of a few numbers for each inner product.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        gradient: Tensor,
        weight: Tensor | float = 1.0,
        *,
        relative: bool = True,
        both: bool = False,
    ):
        self.parts = parts_of_shards(snapshot)
        #: Of each parameter, where `VectorParts.total` does not know them.
        self.shares = [1.0] * len(snapshot.parameters) if self.parts.shares is None else shares_of(snapshot)
        self._originals, self._size = list(trained_parameters(snapshot.module).values()), float(snapshot.size)
        super().__init__(snapshot, gradient, weight, relative=relative, both=both)

    def _whole(self) -> Sequence[Tensor]:
        return self._originals

    def _count(self) -> float:
        return self._size

    def _total(self, values: Sequence[float]) -> list[float]:
        return self.parts.total(torch.tensor(values, dtype=torch.float64)).tolist()

    def _sums(self, values: list[float]) -> list[float]:
        return self._total([share * value for share, value in zip(self.shares, values, strict=True)])

    def _number(self, mask: Tensor) -> float:
        return self._total([float(self.parts.once((mask != 0).double()).sum())])[0]

    def _dots(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*self.parts.total(torch.stack([torch.dot(a, self.parts.once(b)) for a, b in pairs]))]

    def _norms(self, parts: Sequence[Tensor], order: float = 2.0) -> list[float]:
        if order == math.inf:
            largest = [float(part.abs().amax()) if part.numel() else 0.0 for part in parts]
            return [max(values) for values in zip(*self.snapshot.run.ranks.gather(lambda: largest, "largest numbers"))]
        # After vectors over all parameters, if any, come the parts of each of them.
        whole = max(0, len(parts) - len(self.shares)) or len(parts) % len(self.shares)
        weights, counted = [1.0] * whole + self.shares, [self.parts.once(v, 0.5) for v in parts[:whole]]
        sizes = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (*counted, *parts[whole:])]
        return [square**0.5 for square in self._total([w * size**2 for w, size in zip(weights, sizes)])]

    def _norm(self, v: Tensor) -> float:
        return self._norms([v])[0]

    def _moved(self, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        snapshot = self.snapshot
        rise, loss, gradient = displaced_gradient(snapshot.replay, self.parameters, self.start, v, scale, snapshot.loss)
        rise, loss = snapshot.run.ranks.mean(lambda: (rise.double(), loss.double()), "the displaced loss")
        return rise, loss, gradient  # of the mean over the processes already


def shard_hessian(
    step: Snapshot, products: Products, weight: Tensor | float, *, relative: bool = True, both: bool = False
) -> LinearOperator:
    """Return the Hessian of a step on this process's part of the vectors, from passes of the sharded module itself.

    Args:
        step: with shards, and a replay without kinks.
        products: the record of the step's products.
        weight, relative, both: see `Differences`.

    Raises:
        Unmeasurable: without the step's gradient, and where a difference cannot be trusted, as there are no exact
            products.

    Cost: one gradient for each product. Memory: copies of the shards, once, and vectors of the shards' size.
    """
    gradient = step.flat_gradient
    if gradient is None:
        raise Unmeasurable("finite differences start from the step's gradient: pass gradient=... to the Snapshot")
    for differences, H in _earlier(step):
        of = differences.weight
        is_same = of is weight or (isinstance(of, float) and isinstance(weight, float) and of == weight)
        if is_same and bool(differences.least) == (not relative) and differences.both >= both:
            return H  # it knows the scale of the curvature already
    differences = ShardDifferences(step, gradient, weight, relative=relative, both=both)
    H = difference_hessian(differences, products, None)
    H = replace(H, shape=(step.size, step.size), parts=differences.parts)
    _earlier(step).append((differences, H))
    return H


@computed_once
def _earlier(step: Snapshot) -> list[tuple[ShardDifferences, LinearOperator]]:
    """Return the operators that were made of a step so far."""
    return []
