"""The response of a map to a small displacement: to first order, and evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, norm, operator_norm, unit

#: Rows or columns up to which norms are exact.
FEW = 10


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of a map at each point of a batch.

    Attributes:
        value: ``||J||_2``, the change per unit of displacement in the limit of small ones; by Lanczos, from below.
        residual: of it, absolute.
        upper: what ``||J||_2`` is not above: exact where a side of J has at most `FEW` rows, otherwise true with the
            probability that was asked for, of all points together.
        lower: ``||f(x + d v) - f(x)|| / d`` for the direction v that J stretches most, less rounding: a lower bound of
            the change per unit over all displacements of length d. It is above ``value`` where f is convex along v.
        direction: v, of unit length.
        converged: of Lanczos.
    """

    value: Tensor
    residual: Tensor
    upper: Tensor
    lower: Tensor
    direction: Tensor
    converged: bool


def sensitivity(
    jacobian: LinearOperator,
    change: Callable[[Tensor], Tensor],
    distance: float,
    *,
    rounding: float | Tensor = 0.0,
    steps: int = 20,
    tol: float = 1e-3,
    failure: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Sensitivity:
    """Return the largest response of f to a displacement: to first order, and at a real displacement.

    Neither is an upper bound of the other: to first order the change is at most ``upper * distance``, and beyond it
    grows with the curvature of f, ``f'' distance^2 / 2``; only a Lipschitz constant bounds it whatever the distance.

    Args:
        jacobian: of f, ``(m, n)``, or one for each point; Lanczos runs on its smaller side.
        change: ``delta -> f(x + delta) - f(x)``, ``(*batch, n) -> (*batch, m)``.
        distance: d, positive.
        rounding: error of ``||change||``, taken off.
        steps: of Lanczos.
        tol: of its residual, where it is not exact.
        failure: probability with which any ``upper`` is none.
        generator: of the random starts; a fixed seed otherwise.

    Raises:
        ValueError: for a distance that is not positive.

    Cost: ``2 steps`` products, and one evaluation of f.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> square = lambda v: (1 + v).square() - 1  # at x = 1
        >>> result = sensitivity(from_matrix(torch.tensor([[2.0]])), square, 0.5)
        >>> float(result.value), round(float(result.lower), 6) in (1.5, 2.5)  # v is 1 or -1
        (2.0, True)
    """
    if not distance > 0:
        raise ValueError(f"distance={distance!r}: give a positive length")
    m, n = jacobian.shape
    tol = 0.0 if min(m, n) <= FEW else tol
    side, rare = jacobian if n <= m else jacobian.T, failure / max(1, math.prod(jacobian.batch))
    top = operator_norm(side, steps=steps, tol=tol, failure=rare, generator=generator)
    assert top.upper is not None
    v = top.vector if n <= m else jacobian.T @ top.vector
    # Where J vanishes any direction will do.
    v = torch.where((v != 0).any(-1, keepdim=True), unit(v), n**-0.5)
    reached = norm(change(distance * v), -1).cpu() - rounding
    return Sensitivity(top.value, top.residual, top.upper, reached.clamp_min(0) / distance, v, top.converged)
