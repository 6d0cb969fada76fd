"""Ends of norms and variances that are known from random directions alone."""

from __future__ import annotations

import math

from torch import Tensor


def norm_by_random_rows(seen: float, rows: int, size: int, *, failure: float = 1e-3) -> float:
    """Return a bound of ``||M||_2``, by what M does to random directions, that fails with the given probability.

    For orthonormal rows Q, uniform among ``size`` dimensions, ``||M Q^T||_2 >= ||M||_2 ||Q v||`` with v the top right
    singular vector, and ``||Q v||^2`` follows a beta law (rows / 2, (size - rows) / 2), of which
    ``P(x) <= x^a / (a B(a, b))`` for ``b >= 1``. So it is ``sqrt(size)`` times too large, about: all that can be said
    without an adjoint.

    Args:
        seen: ``||M Q^T||_2``.
        rows: of Q.
        size: columns of M.
        failure: see above.

    Source: Dixon 1983, for one random direction.

    Example:
        >>> norm_by_random_rows(2.0, 3, 3)  # all directions
        2.0
        >>> round(norm_by_random_rows(1.0, 4, 100), 1)
        32.9
    """
    if rows >= size:
        return seen
    rows = max(1, min(rows, size - 2))
    a, b = rows / 2, max(size - rows, 2) / 2
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    share = math.exp(min(0.0, (math.log(failure * a) + log_beta) / a))
    return seen / math.sqrt(share)


def gaussian_form_interval(values: Tensor, *, largest: float = math.inf, failure: float = 1e-3) -> tuple[float, float]:
    """Return an interval of ``tr K`` from ``||v_j||^2`` of independent ``v_j ~ N(0, K)``.

    Each end fails with ``failure / 2`` at most. Chernoff's inequality, at the worst spectrum of that trace without
    an eigenvalue above ``largest``: all of them equal. With ``x = mean / tr K`` and ``r = max(tr K / largest, 1)``, ``P
    <= exp(-(m r / 2) (x - 1 - log x))`` on either side.

    Args:
        values: ``(m,)``.
        largest: of the eigenvalues of K, or a bound of it; inf where nothing is known: then K may have rank 1.
        failure: of both ends together.

    Example:
        >>> import torch
        >>> low, high = gaussian_form_interval(torch.full((4,), 100.0), largest=1.0)
        >>> round(low, 1), round(high, 1)
        (73.7, 128.8)
    """
    mean, m, enough = float(values.double().mean()), len(values), math.log(2 / failure)
    if not mean > 0 or not math.isfinite(mean) or not largest > 0:
        return (0.0, 0.0) if mean == 0 else (math.nan, math.nan)

    def unlikely(log_ratio: float) -> bool:
        """Return whether ``tr K = mean exp(log_ratio)`` would have given the values with too small a probability."""
        freedom = m * max(mean * math.exp(log_ratio) / largest, 1.0)
        return freedom / 2 * (math.expm1(-log_ratio) + log_ratio) >= enough

    ends = []
    for sign in (-1.0, 1.0):
        near, far = 0.0, 1.0
        while not unlikely(sign * far):
            near, far = far, 2 * far
        for _ in range(50):
            middle = (near + far) / 2
            near, far = (near, middle) if unlikely(sign * middle) else (middle, far)
        ends.append(mean * math.exp(sign * far))
    return ends[0], ends[1]
