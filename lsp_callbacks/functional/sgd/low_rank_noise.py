"""The top of SGD's second moment by its noise, which is of low rank: some products find it to a few per mille."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, linalg

#: Products of a Lanczos run, at least and at most, before x is looked at again.
LEAST, MOST = 3, 11
#: Residual of a Ritz vector over the tolerance, at which a run ends.
QUIET = 0.3
#: Relative rise of x below which the next product comes first.
NEAR = 0.05
#: Products with a simpler matrix that find a start, and the share of the sizes in it: none begins at 0.
SQUARED, MIXED = 4, 0.3


def top_by_noise(
    rows: Tensor, source: Tensor, fixed: Tensor, tol: float, *, start: Tensor | None = None, steps: int = 60
) -> tuple[float, Tensor] | None:
    """Return the largest x at which ``X -> (x source - fixed) * X - sum_i (y_i^T X y_i) y_i y_i^T`` is singular, and X.

    All but the sum is elementwise. What the sum gives is ``sum_i c_i y_i y_i^T``, and eliminating X leaves
    ``c = M(x) c``, ``M_ij = sum_kl y_ik y_il y_jk y_jl / (x source - fixed)_kl``: a problem of as many numbers as there
    are rows, whose largest eigenvalue falls with x. In turns ``<c, M(x) c> = <c, c>`` is solved for x, which is
    elementwise, and the top of M(x) for c, by Lanczos. A Rayleigh quotient is at most the eigenvalue, so x comes from
    below.

    Args:
        rows: y, ``(N, r)``.
        source: positive, ``(r, r)``.
        fixed: ``(r, r)``.
        tol: relative, of x. What it may lack, the residual over the slope of the quotient, is added to it.
        start: of c, where it is nearly known; None takes the top of ``<y_i, y_j>^2 / (s_i s_j)^(1/2)``, s_i the mean
            source of the modes of sample i, which is M where all modes have one curvature.
        steps: products with M, at most about so many.

    Returns:
        x, and X with ``<X, source X> = 1``; None where it did not converge.

    Cost: ``4 N r^2`` a product, of which four to a dozen are needed.
    """
    columns, negative = rows.mT.contiguous(), -fixed
    c, x, spent = _start(rows, columns, source) if start is None else start, 0.0, 0
    while spent < steps:
        c = c / linalg.vector_norm(c)
        combined = (columns * c) @ rows
        if not spent:  # one term alone reaches 1 below the root; 1 / f is concave: Newton's method rises from there
            x = float(combined.square().add_(fixed).div_(source).max())
        for _ in range(50):
            weight = torch.add(negative, source, alpha=x).reciprocal_()
            solution = combined * weight
            f, slope = _inner(solution, combined), _inner(solution.square(), source)
            if not (slope > 0 and x > 0 and f < float("inf")):
                return None
            rise = max(f * (f - 1) / slope, 0.0)
            if rise <= NEAR * x:
                break
            x += rise
        image = (rows @ solution).mul_(rows).sum(1)
        lacks = float(linalg.vector_norm(image - f * c)) / slope + rise
        if spent and lacks <= tol * x:  # not at first, where c may pass by another eigenvector
            return x + lacks, solution / slope**0.5

        def product(v: Tensor) -> Tensor:
            return (rows @ ((columns * v) @ rows).mul_(weight)).mul_(rows).sum(1)  # noqa: B023

        c, products = _ritz_vector(product, c, image, QUIET * tol)
        spent, x = spent + 1 + products, x + rise
    return None


def _ritz_vector(product: Callable[[Tensor], Tensor], q: Tensor, image: Tensor, tol: float) -> tuple[Tensor, int]:
    """Return the top Ritz vector of a positive matrix, with a residual of ``tol`` times the value, and the products.

    Args:
        product: with the matrix.
        q: a unit vector.
        image: its product.
        tol: relative.
    """
    basis, projected, size = [q], [], 0.0
    while True:
        k, value = len(basis), _inner(image, q)
        rest = image.sub_(q, alpha=value)
        if k > 1:
            rest.sub_(basis[-2], alpha=size)
        projected.append((size, value))
        size = float(linalg.vector_norm(rest))
        if not size < float("inf"):  # the caller will see it
            return rest, k - 1
        is_last = k == MOST or not size > 1e-6 * projected[0][1]  # exhausted
        if is_last or (k >= LEAST and k % 2):
            coupling, diagonal = zip(*projected)
            values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(coupling[1:], -1))  # few numbers
            if is_last or size * abs(vectors[-1, -1]) <= tol * values[-1]:
                return q.new_tensor(vectors[:, -1]) @ torch.stack(basis), k - 1
        q = rest / size
        basis.append(q)
        image = product(q)


def _start(rows: Tensor, columns: Tensor, source: Tensor) -> Tensor:
    """Return a positive vector, as is the first eigenvector of a positive M, and not 0 in any group of samples."""
    squares = rows.square()
    sizes = squares.sum(1)
    matrix = (rows @ columns).square_()
    mean = torch.where(sizes > 0, (squares @ source.diagonal()) / sizes, torch.inf).rsqrt_()
    sizes, c = sizes / sizes.max(), mean
    for _ in range(SQUARED):
        c = (matrix @ c.mul_(mean)).mul_(mean)
        c /= c.max()
    return c.add_(sizes, alpha=MIXED)


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.view(-1), b.view(-1)))
