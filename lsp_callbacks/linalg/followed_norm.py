"""The operator norm of a matrix that moves slowly, followed from one call to the next by a pair of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg.lanczos import lanczos, random_start
from lsp_callbacks.linalg.operator import LinearOperator, norm, unit

#: Right singular vectors that are carried: the largest and the next, which may overtake it.
CARRIED = 2


@dataclass(frozen=True)
class FollowedNorm:
    """An operator norm from below.

    Attributes:
        value: ``||A||``, in float64.
        residual: ``||A^T A v - s^2 v|| / (2 s)``, or by how much less s is than another lower bound; in the units of A.
        vectors: ``(k, n)``, orthonormal, the leading right singular vectors as far as they are known, for the next
            call; k is 2, or 1 where A has no second, or 0 where none is needed.
        begun: pairs of products of Lanczos, where it had to begin; 0 where the vectors were followed.
    """

    value: Tensor
    residual: Tensor
    vectors: Tensor
    begun: int = 0


def followed_norm(
    operator: LinearOperator, vectors: Tensor | None = None, *, steps: int = 20, tol: float = 1e-2
) -> FollowedNorm:
    """Return ``||A||_2`` of an operator, starting from the singular vectors of an earlier one near to it.

    Each call is one step of subspace iteration, with the Ritz value of two vectors: the error is quadratic in the angle
    by which the largest has turned, and where the next one overtakes it, the pair changes places. Where the residual is
    above the tolerance, or without vectors that fit, Lanczos begins anew.

    Args:
        operator: with an adjoint, without a batch axis.
        vectors: `FollowedNorm.vectors` of an earlier call; None, or another length, starts at random.
        steps: at most this many pairs of products of Lanczos.
        tol: on the residual of ``A^T A`` relative to ``||A||^2``, as in `operator_norm`.

    Cost: two products with A and two with its transpose; where that is not enough, Lanczos beside it.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import followed_norm, from_matrix
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> first = followed_norm(from_matrix(A))
        >>> again = followed_norm(from_matrix(1.01 * A), first.vectors)
        >>> round(float(again.value), 6)
        3.03
    """
    n = operator.shape[1]
    if vectors is not None and vectors.shape[-1] == n and bool(torch.isfinite(vectors).all()):
        followed = _iterated(operator, vectors)
        if bool((followed.value > 0) & (2 * followed.residual <= tol * followed.value)):
            return followed
        start = followed.vectors[0]
    else:
        start = random_start((n,), operator.dtype, operator.device, torch.Generator(operator.device).manual_seed(0))
    ritz = lanczos(operator.T @ operator, start, steps=steps, tol=tol)
    top = ritz.pair(-1)
    value = top.value.clamp_min(0).sqrt()
    residual = torch.where(value == 0, 0.0, top.residual / (2 * value).clamp_min(torch.finfo(torch.float64).tiny))
    pairs = range(1, 1 + min(CARRIED, len(ritz.basis)))
    return FollowedNorm(value, residual, torch.stack([ritz.pair(-k).vector for k in pairs]), len(ritz.basis))


def _iterated(operator: LinearOperator, vectors: Tensor) -> FollowedNorm:
    """Return the Ritz pair of one step from orthonormal vectors, and the vectors after it."""
    basis = vectors.to(operator.dtype)
    images = torch.stack([operator.apply(v) for v in basis])
    back = torch.stack([operator.T.apply(u) for u in images])
    exact = images.double()
    gram = (exact @ exact.mT).cpu()
    if not bool(torch.isfinite(gram).all()):
        nan = torch.full((), torch.nan, dtype=torch.float64)
        return FollowedNorm(nan, nan, basis)
    squares, rotation = torch.linalg.eigh(gram)
    square, value = squares[-1].clamp_min(0), squares[-1].clamp_min(0).sqrt()
    rotated = rotation.flip(-1).mT.to(basis)
    ahead = rotated @ back
    defect = norm(ahead[0] - square.to(basis) * (rotated[0] @ basis)).cpu()
    tiny = torch.finfo(torch.float64).tiny
    residual = torch.where(value == 0, 0.0, defect / (2 * value).clamp_min(tiny))
    # ``||A^T A v|| / ||A v||`` is a lower bound for each vector: what has newly become the largest shows in the second.
    reached = norm(ahead, -1).cpu() / squares.flip(-1).clamp_min(tiny).sqrt()
    residual = torch.maximum(residual, torch.where(squares.flip(-1) > 0, reached - value, 0.0).amax())
    first = unit(ahead[0])
    beside = torch.stack([ahead[0], *(v - (first @ v) * first for v in ahead[1:])])
    sizes = norm(beside, -1)
    # Of less rank than there are vectors, the rest is rounding: of no use for the next call.
    full = bool((sizes > 8 * torch.finfo(basis.dtype).eps * sizes[0]).all())
    return FollowedNorm(value, residual, unit(beside) if full else rotated @ basis)
