"""The largest eigenvalue of a symmetric operator from very few products, by the Gauss-Radau rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.linalg.operator import LinearOperator

#: A direction with less than this left of it, once the others are taken out, tells a metric nothing new.
DEPENDENT = 0.03
#: What is left of an image, relative to the largest of them, is rounding below so many square roots of the epsilon.
ROUNDED = 3.0
#: Squares of what is left of images, relative to the scale, are known to so much: a bound does not hang on less.
FLOOR = 1e-9
#: How often an interval is divided in the search of a bound, and into how many parts.
_DIVISIONS, _PARTS = 6, 32


@dataclass(frozen=True)
class TopNode:
    """The largest node of a Gauss-Radau rule.

    Attributes:
        value: an estimate of the largest eigenvalue, at least ``least``.
        least: the largest Ritz value of the same products, a lower bound.
        scale: the largest |Ritz value|.
        directions: weights of the directions in the vector of the estimate.
        images: weights of their images, likewise.
        products: how many were taken.
        recurrence: H compressed to the directions, made orthonormal, and the Gram matrix of what is left of the images.
        start: the first direction in these coordinates.
    """

    value: float
    least: float
    scale: float
    directions: np.ndarray
    images: np.ndarray
    products: int
    recurrence: tuple[np.ndarray, np.ndarray] = field(repr=False)
    start: np.ndarray = field(repr=False)

    @property
    def gain(self) -> float:
        """By how much the estimate exceeds the Ritz value, relative to the estimate; 0 where both are 0."""
        return (self.value - self.least) / max(abs(self.value), np.finfo(float).tiny)

    def hidden(self, overlap: float) -> float:
        """Return how far above the estimate an eigenvalue may be, if its eigenvector has that overlap with the start.

        An eigenvector u with overlaps c with the directions has ``(B^T)^-1 (lambda - T) c`` with what is left of the
        images, and the squares of all add up to 1 at most (Bessel), see `lsp_callbacks.linalg.spectrum_bounds`. The
        least sum for ``start^T c = overlap`` grows with lambda; where it is 1 is the bound. 0 if that lies below the
        estimate.
        """
        T, left = self.recurrence
        if not math.isfinite(self.value) or not self.scale:
            return 0.0 * self.value
        shares, turned = np.linalg.eigh(left)
        inverse = (turned / np.maximum(shares, FLOOR * self.scale**2)) @ turned.T

        def allowed(points: np.ndarray) -> np.ndarray:
            """Return whether an eigenvalue at each point would leave the vectors too much of the start."""
            gap = points[:, None, None] * np.eye(len(T)) - T
            form = np.eye(len(T)) + gap.swapaxes(-1, -2) @ inverse @ gap
            return overlap**2 < np.linalg.solve(form, self.start[:, None])[..., 0] @ self.start

        low = high = self.value
        reach = self.scale
        while allowed(np.array([high])) and reach < math.inf:
            low, high, reach = high, high + reach, 2 * reach
        for _ in range(_DIVISIONS if high > low else 0):
            points = np.linspace(low, high, _PARTS + 1)
            k = int(allowed(points[1:-1]).sum())
            low, high = points[k], points[k + 1]
        return float(high - self.value)


class Images:
    """Directions and their images under a symmetric H, and what they tell of ``R^1/2 H R^1/2`` for diagonals ``R > 0``.

    All of it follows from inner products: ``<d, d'>_(1/R)``, ``<d, H d'>`` and ``<H d, H d'>_R``, where d is ``R^1/2``
    times a vector of the operator. So the products of one metric tell of the others, too.

    Args:
        operator: H.
        rates: R of each metric; None is 1.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import Images, from_matrix
        >>> images = Images(from_matrix(torch.diag(torch.tensor([1.0, 0.4, 0.0, 0.0, 0.0]))))
        >>> images.add(torch.ones(5) / 5**0.5)
        >>> images.add(images.next(images.top()))
        >>> round(images.top().least, 3), round(images.top().value, 3)
        (0.922, 1.0)
    """

    def __init__(self, operator: LinearOperator, rates: Sequence[Tensor | None] = (None,)):
        self.operator, self.rates = operator, rates
        self._directions: list[Tensor] = []
        self._images: list[Tensor] = []
        self._mixed = np.zeros((0, 0))
        self._grams = [(np.zeros((0, 0)), np.zeros((0, 0))) for _ in rates]

    def add(self, direction: Tensor) -> None:
        """Take the product of a direction, a unit vector that nobody changes any more.

        Cost: the product, and inner products with each vector so far.
        """
        dots, rates = self.operator.dots, self.rates
        x, y = direction, self.operator.apply(direction)
        earlier, images = self._directions, self._images
        self._directions, self._images = [*earlier, x], [*images, y]
        columns = dots(self._directions, y).tolist()
        rows = dots(images, x).tolist() if images else []
        self._mixed = np.block([[self._mixed, np.array(columns[:-1])[:, None]], [np.array([*rows, columns[-1]])]])
        for k, (rate, (A, C)) in enumerate(zip(rates, self._grams)):
            if rate is None and len(rates) == 1:  # each is orthogonal to those before it
                overlaps = [0.0] * len(earlier) + [1.0]
            else:
                overlaps = dots(self._directions, x if rate is None else x / rate).tolist()
            shared = dots(self._images, y if rate is None else y * rate).tolist()
            self._grams[k] = _bordered(A, overlaps), _bordered(C, shared)

    def top(self, metric: int = 0) -> TopNode:
        """Return an estimate of the largest eigenvalue in a metric.

        With k directions ``Q`` and ``A Q = Q T + Z B`` the part B of the images that leaves their span is known as
        well: for a Krylov space ``2 k + 1`` moments of the spectral measure of the start, of which the Ritz values use
        ``2 k``. The Gauss-Radau rule with nodes at 0 uses all: T bordered by B and by the corner ``B T^-1 B^T`` that
        makes it singular. Most eigenvalues of a large Hessian are near 0, so a rule with nodes there and k others knows
        more than one with k alone: see ``benchmarks/sharpness_error_bars.md``. The top node is below the largest
        eigenvalue of a positive semidefinite A, and above the largest Ritz value; if A also has negative eigenvalues,
        the corner is kept between 0 and the largest Ritz value, and from three directions on nearer to the quotient of
        the last one, and the node may be on either side. Where no Ritz value is positive, that is all that is told.

        Cost: some products of matrices of k rows. Source: Golub & Meurant 2010, sections 6.2 and 6.3.
        """
        (A, C), eps = self._grams[metric], torch.finfo(self._directions[0].dtype).eps
        k, nan = len(A), math.nan
        if not np.isfinite([A, C, self._mixed]).all():
            none = np.full(k, nan)
            return TopNode(nan, nan, nan, none, none, k, (self._mixed, C), none)
        P = _orthonormal(A)
        T, start = P.T @ self._mixed @ P, P.T @ A[:, 0] / A[0, 0] ** 0.5
        left = P.T @ C @ P - T.T @ T
        values, columns = np.linalg.eigh((T + T.T) / 2)
        least, scale = float(values[-1]), float(max(abs(values[0]), abs(values[-1])))
        value, inside, outside = least, columns[:, -1], np.zeros(len(T))
        sizes, turned = np.linalg.eigh((left + left.T) / 2)
        kept = sizes > (ROUNDED**2 * eps) * max(float(np.trace(P.T @ C @ P)), 0.0)
        if least > 0 and kept.any():
            sizes, turned = sizes[kept] ** 0.5, turned[:, kept]
            B, small = sizes[:, None] * turned.T, np.finfo(float).eps * scale
            corner = (B @ columns) / np.where(np.abs(values) > small, values, small) @ (B @ columns).T
            limit = least if len(T) < 3 else (least + 2 * min(max(0.0, float(T[-1, -1])), least)) / 3
            nodes, axes = np.linalg.eigh((corner + corner.T) / 2)
            corner = (axes * nodes.clip(0.0, limit)) @ axes.T
            nodes, axes = np.linalg.eigh(np.block([[(T + T.T) / 2, B.T], [B, corner]]))
            value, inside, outside = float(nodes[-1]), axes[: len(T), -1], turned / sizes @ axes[len(T) :, -1]
        return TopNode(value, least, scale, P @ (inside - T @ outside), P @ outside, k, (T, left), start)

    def vector(self, node: TopNode, metric: int = 0) -> Tensor:
        """Return the unit vector of an estimate, in the coordinates of ``R^1/2 H R^1/2``; flat."""
        rate = self.rates[metric]
        if rate is None:
            return _sum((*node.directions, *node.images), (*self._directions, *self._images))
        root = rate.sqrt()
        return _sum(node.directions, self._directions).div_(root).add_(_sum(node.images, self._images).mul_(root))

    def next(self, node: TopNode, metric: int = 0) -> Tensor | None:
        """Return the part of an estimate's vector that no product is known of, ``R^1/2`` times, as a unit vector.

        Orthogonal to the directions so far, so that the error of a product by differences is not divided by what little
        is new in it. None if nothing is left.
        """
        weights, (A, C), rate = node.images, self._grams[metric], self.rates[metric]
        if not weights.any():
            weights = np.eye(len(A))[-1]
        inside = -np.linalg.lstsq(A, self._mixed @ weights, rcond=None)[0]
        outside = _sum(weights, self._images)
        rest = outside if rate is None else outside.mul_(rate)
        size = max(0.0, float(weights @ C @ weights)) ** 0.5 if rate is None else float(self.operator.norm(rest))
        for weight, d in zip(inside.tolist(), self._directions):
            rest.add_(d, alpha=weight)
        remains = float(self.operator.norm(rest))
        is_new = remains > torch.finfo(rest.dtype).eps ** 0.5 * size and math.isfinite(remains)
        return rest.div_(remains) if is_new else None


def _bordered(matrix: np.ndarray, last: Sequence[float]) -> np.ndarray:
    """Return a symmetric matrix with one more row and column."""
    row = np.array(last)
    return np.block([[matrix, row[:-1, None]], [row]])


def _orthonormal(A: np.ndarray) -> np.ndarray:
    """Return coefficients of orthonormal combinations of vectors with the Gram matrix A, without dependent ones."""
    columns: list[np.ndarray] = []
    for k in range(len(A)):
        q = np.eye(len(A))[k]
        for p in columns:
            q = q - p * (p @ A @ q)
        size = float(q @ A @ q)
        if size > DEPENDENT**2 * A[k, k]:
            columns.append(q / size**0.5)
    return np.stack(columns, axis=1)


def _sum(weights: Sequence[float] | np.ndarray, vectors: Sequence[Tensor]) -> Tensor:
    """Return a weighted sum of vectors, as a new one."""
    pairs = [(float(weight), v) for weight, v in zip(weights, vectors) if weight]
    total = pairs[0][1] * pairs[0][0] if pairs else torch.zeros_like(vectors[0])
    for weight, v in pairs[1:]:
        total.add_(v, alpha=weight)
    return total
