"""The top of SGD's second moment by its noise, which is of low rank: some products find it to a few per mille."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

#: Products of a Lanczos run, at least and at most, before x is looked at again.
LEAST, MOST = 3, 11
#: Residual of a Ritz vector over the tolerance, at which a run ends.
QUIET = 0.3
#: Relative rise of x below which the next product comes first.
NEAR = 0.05
#: Products with a simpler matrix that find a start, and the share of the sizes in it: none begins at 0.
SQUARED, MIXED = 4, 0.3
#: Rows up to which products are numpy's, which takes a third of the time of torch for a call; for more its BLAS would
#: start threads of its own.
SMALL = 64
#: Real numbers, in float32 or float64. With some dozen rows what counts is the time of a call, so: numpy.
Array = NDArray[Any]


@np.errstate(all="ignore")  # what is not finite is seen in the result
def top_by_noise(
    rows: Array, source: Array, fixed: Array, tol: float, *, start: Array | None = None, steps: int = 60
) -> tuple[float, Array] | None:
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

    Cost: ``4 N r^2`` a product, of which four to a dozen are needed; from 64 rows 0.3 ms.
    """
    columns = np.ascontiguousarray(rows.T)
    c, x, spent = _start(rows, columns, source) if start is None else start, 0.0, 0
    while spent < steps:
        c = c / _norm(c)
        combined = _product(columns * c, rows)
        if not spent:  # one term alone reaches 1 below the root; 1 / f is concave: Newton's method rises from there
            x = float(((combined * combined + fixed) / source).max())
        for _ in range(50):
            weight = 1 / (x * source - fixed)
            solution = combined * weight
            f, slope = _inner(solution, combined), _inner(solution * solution, source)
            if not (slope > 0 and x > 0 and f < float("inf")):
                return None
            rise = max(f * (f - 1) / slope, 0.0)
            if rise <= NEAR * x:
                break
            x += rise
        image = _each(_product(rows, solution), rows)
        lacks = _norm(image - f * c) / slope + rise
        if spent and lacks <= tol * x:  # not at first, where c may pass by another eigenvector
            return x + lacks, solution / slope**0.5

        def product(v: Array) -> Array:
            return _each(_product(rows, _product(columns * v, rows) * weight), rows)  # noqa: B023

        c, products = _ritz_vector(product, c, image, QUIET * tol)
        spent, x = spent + 1 + products, x + rise
    return None


def _ritz_vector(product: Callable[[Array], Array], q: Array, image: Array, tol: float) -> tuple[Array, int]:
    """Return the top Ritz vector of a positive matrix, with a residual of ``tol`` times the value, and the products.

    Args:
        product: with the matrix.
        q: a unit vector.
        image: its product.
        tol: relative.
    """
    basis, projected, size = [q], np.zeros((MOST, MOST), q.dtype), 0.0
    while True:
        k, value = len(basis), _inner(image, q)
        rest = image - value * q
        if k > 1:
            rest -= size * basis[-2]
            projected[k - 1, k - 2] = size
        projected[k - 1, k - 1] = value
        size = _norm(rest)
        if not size < float("inf"):  # the caller will see it
            return rest, k - 1
        is_last = k == MOST or not size > 1e-6 * projected[0, 0]  # exhausted
        if is_last or (k >= LEAST and k % 2):
            values, vectors = np.linalg.eigh(projected[:k, :k])  # few numbers
            if is_last or size * abs(vectors[-1, -1]) <= tol * values[-1]:
                return vectors[:, -1] @ np.stack(basis), k - 1
        q = rest / size
        basis.append(q)
        image = product(q)


def _start(rows: Array, columns: Array, source: Array) -> Array:
    """Return a positive vector, as is the first eigenvector of a positive M, and not 0 in any group of samples."""
    squares = rows * rows
    sizes = squares.sum(1)
    matrix = _product(rows, columns)
    matrix *= matrix
    mean = np.where(sizes > 0, np.sqrt(sizes / (squares @ source.diagonal())), 0)
    sizes, c = sizes / sizes.max(), mean
    for _ in range(SQUARED):
        c = matrix @ (c * mean) * mean
        c /= c.max()
    return c + MIXED * sizes


def eigenpairs(matrix: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns."""
    if len(matrix) <= SMALL:
        return np.linalg.eigh(matrix)
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def _product(a: Array, b: Array) -> Array:
    return a @ b if len(b) <= SMALL else (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def _each(a: Array, b: Array) -> Array:
    return np.einsum("ij,ij->i", a, b)


def _inner(a: Array, b: Array) -> float:
    return float(np.vdot(a, b))


def _norm(v: Array) -> float:
    return float(np.vdot(v, v)) ** 0.5
