"""Bounds on the ends of a spectrum that hold with a given probability, from the vectors of a Lanczos run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsp_callbacks.linalg.ritz import Ritz

#: Points of a grid that brackets the bound, and how often it is refined.
_POINTS, _ROUNDS = 64, 6


def spectrum_bounds(ritz: Ritz, *, failure: float = 1e-3, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a lower bound of the smallest eigenvalue and an upper bound of the largest, from a Lanczos run.

    Each holds with probability ``1 - failure`` over the start b, which must have been drawn uniformly from the sphere
    (normalised Gaussian numbers), independent of A. Nothing is assumed about the spectrum. A warm start w may be mixed
    with a random one, ``b = (w + s r) / ||w + s r||``, where r is a random unit vector independent of A and w: then
    ``share = s / ||w + s r||``, and the bound is the wider. The overlap of r with an eigenvector has a density that is
    symmetric and, from n = 3 on, nowhere rises away from 0: no shift by w makes it likelier to be small (Anderson
    1955).

    Lanczos' vectors are ``q_j(A) b`` with polynomials q_j of degree ``j = 0 ... k``, so that their overlaps with the
    eigenvector u of the largest eigenvalue are ``q_j(lambda) <u, b>``, and ``<u, b>^2 sum_j q_j(lambda)^2 <= 1`` by
    Bessel. With ``P(|<u, b>| < share d sqrt(pi / 2n)) <= d`` the largest eigenvalue is, except with probability d, at
    most the point above all Ritz values where ``sum_j q_j^2 = 2 n / (pi d^2 share^2)``. It is the same event for every
    k, so the run may stop at any step. Once a block is invariant (beta = 0, or k = n) the bound is the largest Ritz
    value.

    For products that are not exact, rounding and the deviation from the three-term recurrence are added; the bound is
    then that of the operator that was really applied.

    Args:
        ritz: of `lanczos`.
        failure: d.
        share: norm of the random part of the start, a unit vector; 1 is all of it.

    Returns:
        ``(*batch,)`` each, float64.

    Cost: none besides the run. Source: van Dorsselaer, Hochstenbach & van der Vorst 2000, with the sum for their last
    term; the bound of Kuczynski & Wozniakowski 1992, Thm 4.2, is what it gives for the worst spectrum.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix, lanczos, spectrum_bounds
        >>> A = from_matrix(torch.diag(torch.linspace(0, 1, 500, dtype=torch.float64)))
        >>> start = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> low, high = spectrum_bounds(lanczos(A, start, steps=30))
        >>> bool(-0.05 < low < 0 and 1 < high < 1.05)
        True
    """
    return -bound_beyond(ritz, failure, -1, share), bound_beyond(ritz, failure, 1, share)


def bound_beyond(ritz: Ritz, failure: float, sign: int, share: float = 1.0) -> Tensor:
    """Return an upper bound of the eigenvalues of ``sign A``, see `spectrum_bounds`."""
    middle, couplings, defect = _recurrence(ritz, sign)
    enough = _enough(ritz.basis.shape[-1], failure, share)
    return _reach(middle, couplings, sign * ritz.values[..., -1 if sign > 0 else 0], enough) + defect


def within(ritz: Ritz, signs: Sequence[int], *, failure: float, share: float, tol: float) -> Tensor:
    """Return whether `bound_beyond` exceeds the largest Ritz value of ``sign A`` by ``tol max |value|`` at most.

    For all given signs; at the cost of one point of the search in `bound_beyond`.
    """
    return torch.stack([_within(ritz, failure, share, sign, tol) for sign in signs]).all(0)


def _within(ritz: Ritz, failure: float, share: float, sign: int, tol: float) -> Tensor:
    middle, couplings, defect = _recurrence(ritz, sign)
    away = tol * ritz.values.abs().amax(-1) - defect
    reached = _log_growth(middle, couplings, sign * ritz.values[..., -1 if sign > 0 else 0] + away)
    return (away >= 0) & (reached >= _enough(ritz.basis.shape[-1], failure, share))


def _enough(n: int, failure: float, share: float) -> float:
    if not 0 < failure < 1:
        raise ValueError(f"failure={failure!r} is no probability: pass a number between 0 and 1")
    return math.log(2 * n / math.pi) - 2 * math.log(failure * share)


def _recurrence(ritz: Ritz, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return diagonal and couplings of the three-term recurrence of ``sign A``, and the norm of what it neglects."""
    k, n = len(ritz.basis), ritz.basis.shape[-1]
    values = sign * ritz.values
    projected = (ritz.coefficients * values[..., None, :]) @ ritz.coefficients.mT
    middle = projected.diagonal(dim1=-2, dim2=-1)
    couplings = projected.diagonal(1, -2, -1).abs()
    last = (
        torch.linalg.vector_norm(ritz.residuals, dim=-1, keepdim=True) if k < n else torch.zeros_like(middle[..., :1])
    )
    couplings = torch.cat([couplings, last], dim=-1)
    rounding = 16 * torch.finfo(ritz.basis.dtype).eps * values.abs().amax(-1)
    defect = projected.tril(-2).square().sum((-2, -1)).mul(2).sqrt() + rounding
    return middle, couplings, defect


def _reach(middle: Tensor, couplings: Tensor, top: Tensor, enough: float) -> Tensor:
    """Return the point above ``top`` where ``log sum_j q_j^2`` reaches ``enough``, rounded up."""
    size = torch.maximum(middle.abs().amax(-1), couplings.amax(-1))
    below, above = torch.zeros_like(top), 4 * size.clamp_min(torch.finfo(torch.float64).tiny)
    # Beyond 4 scales every degree multiplies q by more than 2.
    while bool((short := _log_growth(middle, couplings, top + above) < enough).any()):
        above = torch.where(short, 2 * above, above)
    share = torch.linspace(0, 1, _POINTS + 1, dtype=top.dtype, device=top.device)[1:]
    for _ in range(_ROUNDS):
        points = below[..., None] + (above - below)[..., None] * share
        reached = _log_growth(middle[..., None, :], couplings[..., None, :], top[..., None] + points) >= enough
        first = reached.int().argmax(-1, keepdim=True)  # the last point always reaches it
        above = points.gather(-1, first)[..., 0]
        below = torch.where(first > 0, points.gather(-1, (first - 1).clamp_min(0)), below[..., None])[..., 0]
    return torch.where(size > 0, top + above, top)  # NaN stays, and the bound of a zero operator is 0


def _log_growth(middle: Tensor, couplings: Tensor, at: Tensor) -> Tensor:
    """Return ``log sum_j q_j(at)^2`` above all Ritz values, where all q_j are positive, by their ratios."""
    logs, ratio, before = [torch.zeros_like(at)], torch.full_like(at, torch.inf), torch.zeros_like(at)
    for j in range(middle.shape[-1]):
        ratio = (at - middle[..., j] - before / ratio).clamp_min(0) / couplings[..., j]
        before = couplings[..., j]
        logs.append(logs[-1] + 2 * ratio.log())
    return torch.logsumexp(torch.stack(logs).nan_to_num(torch.inf, torch.inf, -torch.inf), dim=0)
