"""The top of SGD's second moment by its noise, which is of low rank: some products find it to a few per mille."""

from __future__ import annotations

from functools import lru_cache
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
#: start threads of its own. Up to as many M(x) is formed.
SMALL = 64
#: So often M(x) is squared, before and after its entries are made small again, and for how many products that counts.
BEFORE, AFTER, SPENT = 2, 3, 4
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
    elementwise, and the top of M(x) for c, by a power of M or, for many rows, by Lanczos. A Rayleigh quotient is at
    most the eigenvalue, so x comes from below.

    Args:
        rows: y, ``(N, r)``.
        source: positive, ``(r, r)``.
        fixed: ``(r, r)``.
        tol: relative, of x. What it may lack, the residual over the slope of the quotient, is added to it.
        start: of c, where it is nearly known; None takes the top of a simpler matrix.
        steps: products with M, at most about so many.

    Returns:
        x, and X with ``<X, source X> = 1``; None where it did not converge.

    Cost: ``N^2 r^2 / 2`` for each M, of which two or three are needed, 0.2 ms from 32 rows; for more than 64 rows ``4 N
    r^2`` a product, of which four to a dozen are needed.
    """
    held = _FewRows(rows) if len(rows) <= SMALL else _ManyRows(rows)
    source, fixed = held.entries(source), held.entries(fixed)
    c, x, spent = held.start(source) if start is None else start, 0.0, 0
    while spent < steps:
        c = c / _norm(c)
        combined = held.combined(c)
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
        image = held.image(solution)
        lacks = _norm(image - f * c) / slope + rise
        if spent and lacks <= tol * x:  # not at first, where c may pass by another eigenvector
            return x + lacks, held.matrix(solution / slope**0.5)
        c, products = held.top(weight, c, image, QUIET * tol)
        spent, x = spent + 1 + products, x + rise
    return None


class _FewRows:
    """Rows whose products for each pair of modes are held, ``(r (r + 1) / 2, N)``: M(x) takes one product of matrices.

    Symmetric matrices of modes are vectors of their entries at and above the diagonal, those above it times the root
    of 2, so that inner products stay the same.
    """

    def __init__(self, rows: Array):
        self._size = rows.shape[1]
        self._first, self._second, self._root = _upper(self._size, rows.dtype)
        columns = np.ascontiguousarray(rows.T)
        self._products = columns[self._first]
        self._products *= columns[self._second]
        self._products *= self._root[:, None]

    def entries(self, matrix: Array) -> Array:
        """Return the factors of the entries in an elementwise product with a matrix."""
        return matrix[self._first, self._second]

    def matrix(self, values: Array) -> Array:
        whole = np.empty((self._size, self._size), values.dtype)
        whole[self._first, self._second] = whole[self._second, self._first] = values / self._root
        return whole

    def combined(self, c: Array) -> Array:
        """Return ``sum_i c_i y_i y_i^T``."""
        return self._products @ c

    def image(self, x: Array) -> Array:
        """Return ``y_i^T X y_i``."""
        return x @ self._products

    def start(self, source: Array) -> Array:
        """Return the top of M where nothing is fixed."""
        return self.top(1 / source, np.ones(self._products.shape[1], self._products.dtype))[0]

    def top(self, weight: Array, c: Array, image: Array | None = None, tol: float = 0.0) -> tuple[Array, int]:
        """Return nearly the top of M, whose entries are positive, from c, and the products that this counts for."""
        power = self._products.T @ (self._products * weight[:, None])
        for squarings in (BEFORE, AFTER):
            power /= power.max()
            for _ in range(squarings):
                power = power @ power
        return power @ c, SPENT


class _ManyRows:
    """Rows that are multiplied anew for each product with M(x)."""

    def __init__(self, rows: Array):
        self._rows, self._columns = rows, np.ascontiguousarray(rows.T)

    def entries(self, matrix: Array) -> Array:
        return matrix

    def matrix(self, values: Array) -> Array:
        return values

    def combined(self, c: Array) -> Array:
        """Return ``sum_i c_i y_i y_i^T``."""
        return _product(self._columns * c, self._rows)

    def image(self, x: Array) -> Array:
        """Return ``y_i^T X y_i``."""
        return _each(_product(self._rows, x), self._rows)

    def start(self, source: Array) -> Array:
        """Return a positive vector, as is the first eigenvector of a positive M, and not 0 in any group of samples.

        The top of ``<y_i, y_j>^2 / (s_i s_j)^(1/2)``, s_i the mean source of the modes of sample i, which is M where
        all modes have one curvature.
        """
        squares = self._rows * self._rows
        sizes = squares.sum(1)
        matrix = _product(self._rows, self._columns)
        matrix *= matrix
        mean = np.where(sizes > 0, np.sqrt(sizes / (squares @ source.diagonal())), 0)
        sizes, c = sizes / sizes.max(), mean
        for _ in range(SQUARED):
            c = matrix @ (c * mean) * mean
            c /= c.max()
        return c + MIXED * sizes

    def top(self, weight: Array, q: Array, image: Array, tol: float) -> tuple[Array, int]:
        """Return the top Ritz vector of M, with a residual of ``tol`` times the value, and the products.

        Args:
            weight: ``1 / (x source - fixed)``.
            q: a unit vector.
            image: its product with M.
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
            image = self.image(self.combined(q) * weight)


@lru_cache(maxsize=8)
def _upper(size: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Return the places at and above the diagonal of a symmetric matrix, and 1 there and the root of 2 above it."""
    first, second = np.triu_indices(size)
    return first, second, np.where(first == second, 1.0, 2**0.5).astype(dtype)


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
    return float(a.ravel().dot(b.ravel()))


def _norm(v: Array) -> float:
    return float(v.dot(v)) ** 0.5
