"""Norms and largest eigenvalues of operators, from both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.linalg.lanczos import lanczos, random_start
from lsp_callbacks.linalg.operator import LinearOperator
from lsp_callbacks.linalg.ritz import Eigenpair, Ritz
from lsp_callbacks.linalg.spectrum_bounds import bound_beyond


def operator_norm(
    operator: LinearOperator,
    start: Tensor | None = None,
    *,
    steps: int = 30,
    tol: float = 1e-3,
    failure: float | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpair:
    """Return ``||A||_2 = sqrt(lambda_max(A^T A))`` with the right singular vector.

    Args:
        operator: any shape, with an adjoint.
        start: ``(*batch, n)``, for instance the vector of the last call; None starts at random.
        steps: at most this many pairs of products.
        tol: on the residual of ``A^T A`` relative to ``||A||^2``; the value's relative error is at most half
            of it from some singular value, and quadratically small where the largest is separated.
        failure: requests ``upper``, which the norm exceeds with at most this probability over the random start. It is
            exact after n steps: where those are allowed they are taken, whatever ``tol``.
        generator: of the random start.

    Returns:
        The norm and its vector; ``residual`` is ``||A^T A v - s^2 v|| / (2 s)``, in the units of A. The value
        is always a lower bound.

    Raises:
        ValueError: for an upper bound from a start that is not random.

    Cost: one product with A and one with its transpose for each step.
    """
    if start is not None and failure is not None:
        raise ValueError(
            "failure=... needs a random start, whose probability of missing the top is known: pass start=None"
        )
    if start is None:
        generator = generator or torch.Generator(operator.device).manual_seed(0)
        start = random_start((*operator.batch, operator.shape[1]), operator.dtype, operator.device, generator)
    if failure is not None and operator.shape[1] <= steps:
        tol = 0.0
    ritz = lanczos(operator.T @ operator, start, steps=steps, tol=tol, generator=generator)
    top = ritz.pair(-1)
    value = top.value.clamp_min(0).sqrt()
    residual = torch.where(value == 0, 0.0, top.residual / (2 * value).clamp_min(torch.finfo(torch.float64).tiny))
    upper = None if failure is None else bound_beyond(ritz, failure, 1).clamp_min(0).sqrt()
    return Eigenpair(value, top.vector, residual, top.products, top.converged, upper)


def norm_upper(operator: LinearOperator, *, steps: int = 30, failure: float = 1e-3) -> Tensor:
    """Return an upper bound of ``||A||_2``, which fails with probability ``failure``.

    It is exact where the shorter side has at most ``steps`` entries. See `spectrum_bounds`.

    Cost: ``2 steps`` products, ``2 min(m, n)`` at most.
    """
    m, n = operator.shape
    upper = operator_norm(operator if n <= m else operator.T, steps=steps, tol=0.0, failure=failure).upper
    assert upper is not None
    return upper


def top_between(
    operator: LinearOperator,
    *,
    steps: int,
    ratio: float = 1.0,
    failure: float = 1e-3,
    generator: torch.Generator | None = None,
) -> tuple[Ritz, Tensor]:
    """Bound the largest eigenvalue of a positive semidefinite operator, or of each of a batch, from both sides.

    Lanczos from a random start, until the upper end is at most ``ratio`` times the lower one, the largest Ritz value.

    Args:
        operator: symmetric.
        steps: at most this many products.
        ratio: of the ends at which to stop.
        failure: probability with which an upper end, of each in the batch, does not hold; see `spectrum_bounds`.
        generator: of the start.

    Returns:
        The result of Lanczos, and the upper ends, ``(*batch,)`` in float64.

    Cost: at most ``steps`` products, ``n`` where the operator is smaller; it is exact then.
    """
    generator = generator or torch.Generator(operator.device).manual_seed(0)
    start = random_start((*operator.batch, operator.shape[1]), operator.dtype, operator.device, generator)
    ritz = lanczos(operator, start, steps=steps, tol=ratio - 1, failure=failure, generator=generator)
    return ritz, bound_beyond(ritz, failure, 1)
