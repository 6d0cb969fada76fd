"""The largest eigenvalue of a symmetric operator from very few products, by the Gauss-Radau rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.linalg.operator import LinearOperator

#: A remainder this much shorter than its product has lost digits, and is made orthogonal again. A longer one may still
#: lose one digit more than the vectors before it: few vectors can afford that, more are all made orthogonal twice.
LOST, FORGIVEN = 0.1, 4
#: Halvings of an interval in the search of a bound.
_HALVINGS = 12


@dataclass(frozen=True)
class TopNode:
    """The largest node of a Gauss-Radau rule.

    Attributes:
        value: an estimate of the largest eigenvalue, at least ``least``.
        least: the largest Ritz value of the same products, a lower bound.
        basis: Lanczos' vectors, orthonormal.
        weights: of each in the vector of the estimate.
        products: how many were taken.
        scale: the largest |Ritz value|.
        complete: whether the products span an invariant subspace: then the estimate is the Ritz value.
        recurrence: ``(k + 1, k + 1)``, T bordered by the last coupling.
    """

    value: Tensor
    least: Tensor
    basis: list[Tensor]
    weights: Tensor
    products: int
    scale: Tensor
    complete: bool
    recurrence: Tensor

    @cached_property
    def vector(self) -> Tensor:
        """The unit vector of the estimate, flat."""
        first, *weights = self.weights.tolist()
        vector = self.basis[0] * first
        for q, weight in zip(self.basis[1:], weights):
            vector.add_(q, alpha=weight)
        return vector

    @property
    def gain(self) -> Tensor:
        """Return by how much the estimate exceeds the Ritz value, relative to the estimate; 0 where both are 0."""
        return (self.value - self.least) / self.value.abs().clamp_min(torch.finfo(torch.float64).tiny)

    def hidden(self, overlap: float) -> Tensor:
        """Return how far above the estimate an eigenvalue may be, if its eigenvector has that overlap with the start.

        The overlaps with Lanczos' vectors are ``q_j(lambda) overlap``, and the sum of their squares is at most 1
        (Bessel), see `lsp_callbacks.linalg.spectrum_bounds`: the point where ``sum_j q_j^2 = 1 / overlap^2``. 0 if that
        lies below the estimate.
        """
        if self.complete or not bool(self.value.isfinite()):
            return 0.0 * self.value
        middle = self.recurrence.diagonal()[:-1].tolist()
        couplings = self.recurrence.diagonal(1).abs().tolist()

        def allowed(point: float) -> bool:
            """Return whether an eigenvalue at the point would leave the vectors too much of the start."""
            before, q, total = 0.0, 1.0, 1.0
            for j, (a, b) in enumerate(zip(middle, couplings)):
                before, q = q, ((point - a) * q - (couplings[j - 1] * before if j else 0.0)) / b
                total += q * q
            return total * overlap**2 < 1

        low = high = float(self.value)
        reach = max(map(abs, (*middle, *couplings)))
        while allowed(high):
            low, high, reach = high, high + reach, 2 * reach
        for _ in range(_HALVINGS if high > low else 0):
            point = (low + high) / 2
            low, high = (point, high) if allowed(point) else (low, point)
        return self.value.new_tensor(high) - self.value


def top_node(
    operator: LinearOperator, start: Tensor, *, steps: int, most: int | None = None,
    enough: Callable[[TopNode], bool] = lambda node: True,
) -> TopNode:  # fmt: skip
    """Return an estimate of the largest eigenvalue, with its vector, from ``steps`` Lanczos steps.

    After k products ``A Q = Q T + b q e^T`` the coupling b and the next vector q are known as well: ``2 k + 1`` moments
    of the spectral measure of the start, of which the Ritz values use ``2 k``. The Gauss-Radau rule with a node at 0
    uses all: T bordered by b and by the corner ``b^2 e^T T^-1 e`` that makes it singular. Most eigenvalues of a large
    Hessian are near 0, so a rule with a node there and k others knows more than one with k alone: see
    ``benchmarks/sharpness_error_bars.md``. The top node is below the largest eigenvalue of a positive semidefinite A,
    and above the largest Ritz value; if A also has negative eigenvalues, the corner is kept between 0 and the largest
    Ritz value, and the node may be on either side. Where no Ritz value is positive, that is all that is told.

    Args:
        operator: symmetric, ``(n, n)``.
        start: ``(n,)``, not zero.
        steps: products; n at most.
        most: products while ``enough`` says no; None is ``steps``.
        enough: from the estimate so far to whether it will do.

    Raises:
        ValueError: for fewer than 1 step.

    Cost: the products, the memory of one vector each, and one pass over each of these vectors and the product.
    Source: Golub & Meurant 2010, sections 6.2 and 6.3.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix, top_node
        >>> A = from_matrix(torch.diag(torch.tensor([1.0, 0.4, 0.0, 0.0, 0.0])))
        >>> found = top_node(A, torch.ones(5), steps=2)
        >>> round(float(found.least), 3), round(float(found.value), 3)
        (0.922, 1.0)
    """
    if steps < 1:
        raise ValueError(f"steps={steps!r} leaves nothing to estimate from: pass at least 1")
    n = operator.shape[1]
    most = min(max(most or steps, steps), n)
    start = start / operator.norm(start).to(start.dtype)  # the caller may have let go of the other
    basis = [start]
    T = np.zeros((most + 1, most + 1))
    for k in range(most):
        overlaps, size, w = _remainder(operator, operator.apply(basis[k]), basis)
        T[: k + 1, k] = T[k, : k + 1] = overlaps
        T[k, k + 1] = T[k + 1, k] = size
        if not math.isfinite(sum(overlaps) + size):
            nan = torch.tensor(torch.nan, dtype=torch.float64)
            return TopNode(nan, nan, basis[:1], nan[None], k + 1, nan, False, torch.from_numpy(T))
        complete = k + 1 == n or size <= 8 * torch.finfo(start.dtype).eps * math.hypot(*T[: k + 1, : k + 1].flat)
        if not complete:
            basis.append(w.div_(size))
        if not complete and k + 1 < steps:
            continue
        node = _node(T[: k + 2, : k + 2].copy(), basis, complete)
        if complete or enough(node):
            break
    return node


def _remainder(operator: LinearOperator, w: Tensor, basis: list[Tensor]) -> tuple[list[float], float, Tensor]:
    """Return the overlaps of a vector with an orthonormal basis, and the norm of what is left, with that itself."""
    total = [0.0] * len(basis)
    for _ in range(2):
        overlaps = operator.dots(basis, w).tolist()
        w = torch.sub(w, basis[0], alpha=overlaps[0])
        for q, overlap in zip(basis[1:], overlaps[1:]):
            w.sub_(q, alpha=overlap)
        total = [a + b for a, b in zip(total, overlaps)]
        product = sum(x * x for x in overlaps) ** 0.5
        size = float(operator.norm(w))
        if size >= LOST * product and len(basis) <= FORGIVEN:
            break
    return total, size, w


def _node(T: np.ndarray, basis: list[Tensor], complete: bool) -> TopNode:
    """Return the top node of the rule; T holds the last coupling, and its corner is free."""
    k = len(T) - 1
    values, vectors = np.linalg.eigh(T[:k, :k])
    least, weights, scale = values[-1], vectors[:, -1], max(abs(values[0]), abs(values[-1]))
    value = least
    if not complete and least > 0:
        bordered, small = T.copy(), np.finfo(np.float64).eps * scale
        inverse = np.where(np.abs(values) > small, values, small)
        bordered[k, k] = min(max(T[k, k - 1] ** 2 * (vectors[-1] ** 2 / inverse).sum(), 0.0), least)
        nodes, columns = np.linalg.eigh(bordered)
        value, weights = nodes[-1], columns[:, -1]
    value, least, scale = torch.tensor([value, least, scale], dtype=torch.float64).unbind()
    return TopNode(
        value, least, basis[: len(weights)], torch.from_numpy(weights), k, scale, complete, torch.from_numpy(T)
    )
