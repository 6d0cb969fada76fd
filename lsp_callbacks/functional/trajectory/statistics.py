"""Error bars for means of few windows and of correlated steps."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks._validation import whole


def batch_means(values: Tensor, *, blocks: int = 20) -> tuple[Tensor, Tensor]:
    """Return the mean of a correlated series and its standard error, by batch means.

    The series is cut into ``blocks`` equal runs (the oldest remainder is left out); the spread of their means is that
    of nearly independent numbers if a block is much longer than the correlation time.

    Args:
        values: ``(n,)`` or ``(n, k)``.
        blocks: how many runs.

    Returns:
        The mean of all values, and its standard error; both ``()`` or ``(k,)``.

    Raises:
        ValueError: with fewer than two values a block.

    Source: Schmeiser 1982; on an AR(1) with rho = 0.9 the naive ``sigma / sqrt(n)`` is wrong by a factor of 4.
    """
    length = len(values) // blocks
    if length < 2:
        raise ValueError(f"{len(values)} values are too few for blocks={blocks}: give at least {2 * blocks}")
    runs = values[len(values) - blocks * length :].double().reshape(blocks, length, *values.shape[1:])
    return values.double().mean(0), runs.mean(1).std(0) / blocks**0.5


def student_bounds(values: Tensor, *, confidence: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of independent windows with one-sided Student bounds.

    Args:
        values: ``(n,)``.
        confidence: of each bound by itself; both together hold with ``2 confidence - 1``.

    Returns:
        ``(mean, lower, upper)`` in float64; the bounds are NaN below 3 values.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import student_bounds
        >>> mean, lower, upper = student_bounds(torch.tensor([-0.1, 0.0, 0.1]))
        >>> round(float(upper), 4)  # 0.1 / sqrt(3) times t(0.9, 2 degrees of freedom) = 1.8856
        0.1089
    """
    values = values.double()
    mean = values.mean()
    if len(values) < 3:
        return mean, torch.full_like(mean, torch.nan), torch.full_like(mean, torch.nan)
    half = student_quantile(confidence, len(values) - 1) * values.std() / len(values) ** 0.5
    return mean, mean - half, mean + half


def fieller(top: Tensor, below: Tensor, covariance: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return bounds on the ratio of two means: all r for which ``top - r below = 0`` is not rejected.

    ``(top - r below)^2 <= quantile^2 Var(top - r below)``. Unlike those of the delta method they are right where the
    denominator is hardly known.

    Args:
        top: ``()``.
        below: ``()``.
        covariance: ``(2, 2)`` of both estimates.
        quantile: of Student's t, one-sided for each bound.

    Returns:
        The least and the largest ratio; both NaN where the denominator may be 0: then no ratio is too large.

    Source: Fieller 1954.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import fieller
        >>> least, most = fieller(torch.tensor(3.0), torch.tensor(2.0), torch.zeros(2, 2), 2.0)
        >>> float(least), float(most)
        (1.5, 1.5)
    """
    square = quantile**2
    a = below**2 - square * covariance[1, 1]
    b = top * below - square * covariance[0, 1]
    c = top**2 - square * covariance[0, 0]
    root = (b**2 - a * c).clamp_min(0).sqrt()
    a = torch.where(a > 0, a, torch.nan)
    return (b - root) / a, (b + root) / a


@lru_cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t: the x below which it lies with the given probability.

    With ``x = sqrt(nu) tan(a)`` the density becomes ``cos(a)^(nu - 1)``, decreasing on ``[0, pi / 2]``, so that its
    mass beyond a, by Gauss-Legendre quadrature, is convex: Newton's iteration from 0 rises to the solution.

    Args:
        probability: between 0 and 1.
        degrees: nu, of freedom; at least 1.

    Raises:
        ValueError: for anything else.

    Cost: a few microseconds, once for each pair of arguments; accurate to 1e-9 between 0.6 and 0.999.

    Source: Student 1908.

    Example:
        >>> from lsp_callbacks.functional import student_quantile
        >>> round(student_quantile(0.9, 2), 6), round(student_quantile(0.975, 10), 6)
        (1.885618, 2.228139)
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability!r}: give a number between 0 and 1")
    whole("degrees", degrees, 1)
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    points, weights = np.polynomial.legendre.leggauss(64)
    end = min(math.pi / 2, 10 / math.sqrt(degrees))  # beyond it there is less than 1e-20

    def beyond(angle: float) -> float:
        half = (end - angle) / 2
        return float(half * weights @ np.cos(angle + half * (1 + points)) ** (degrees - 1))

    mass, angle = 2 * (1 - probability) * beyond(0.0), 0.0
    for _ in range(100):
        step = (beyond(angle) - mass) / math.cos(angle) ** (degrees - 1)
        if not step > 1e-16 * angle:
            break
        angle += step
    return math.sqrt(degrees) * math.tan(angle)
