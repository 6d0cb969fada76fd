"""Error bars for means of few windows and of correlated steps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def batch_means(values: Tensor, *, blocks: int = 20) -> tuple[Tensor, Tensor]:
    """Mean of a correlated series and its standard error, by batch means.

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
    """Mean of independent windows with one-sided Student bounds.

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
    """Bounds on the ratio of two means: all r that ``top - r below = 0`` is not at odds with.

    ``(top - r below)^2 <= quantile^2 Var(top - r below)``. Unlike those of the delta method they are right where the
    denominator is hardly known.

    Args:
        top: ``()``.
        below: ``()``.
        covariance: ``(2, 2)`` of both estimates.
        quantile: of Student's t, one-sided for each bound.

    Returns:
        The least and the largest ratio; both NaN where the denominator cannot be told from 0: then no ratio is too
        large.

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
    """The quantile of Student's t, by quadrature of its density in ``x = sqrt(nu) tan(a)``: no SciPy needed."""
    angle = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(2 * probability - 1, mass / mass[-1], angle)))
