"""How large a residual step may be: stiffness, gain and CFL margin of ``x + h g(x)``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, Ritz, lanczos, norm, operator_norm, unit
from lsp_callbacks.linalg.operator import Product
from lsp_callbacks.linalg.spectrum_bounds import bound_beyond

#: Probability that ``gain_bound`` does not hold.
FAILURE = 1e-3


@dataclass(frozen=True)
class ResidualStability:
    """Stability of one residual block at the inputs that it received; extremes are over the samples.

    The gain is how much the block stretches a small difference of its input at most: it expands where that is above 0,
    and contracts below. Each other number proves one of the two, and the opposite of what it proves does not follow:
    ``x + 2x`` has stiffness -1 and gain log 3, and where ``m > 0`` a block may contract though ``cfl`` is above 1.

    Attributes:
        gain: ``log ||I + hG||_2`` in nats, from below.
        gain_bound: and at most, except with probability 1e-3.
        stiffness: ``h lambda_max(-(G + G^T)/2) / 2``; above 1 the block expands, at most 1 proves nothing.
        m: ``-lambda_max((G + G^T)/2)``, the least over samples; below 0 the block expands, whatever h is.
        dissipative: ``m`` exceeds its residual: some h > 0 contracts, which need not be this one.
        M: ``||G||_2``, the largest over samples; only where dissipative, as are the following.
        h_max: ``2 m / M^2``: each h below contracts (Katende 2025, Cor. 4.4).
        h_exact: the largest h with ``||I + hG|| <= 1`` for each sample: above it the block expands.
        cfl: ``h / h_max``; below 1 the block contracts, above 1 proves nothing.
        residual: the largest relative residual of the iterations behind the numbers.
    """

    gain: Tensor
    gain_bound: Tensor
    stiffness: Tensor
    m: Tensor
    dissipative: bool
    residual: Tensor
    M: Tensor | None = None
    h_max: Tensor | None = None
    h_exact: Tensor | None = None
    cfl: Tensor | None = None


def residual_stability(
    jacobian: LinearOperator, *, h: float = 1.0, steps: int = 12, tol: float = 1e-2
) -> ResidualStability:
    """Return stiffness, gain and step limits of ``x + h g(x)``, one explicit Euler step in depth.

    Stiffness and ``m`` are the two ends of one Lanczos run on the symmetric part, the gain another on ``I + hG``. Where
    ``m <= 0`` no step contracts: the usual case in real networks, and no ``h_max`` is given then.

    Args:
        jacobian: ``hG``, of shape ``(d, d)``, with an optional batch axis over samples.
        h: the step size by which ``hG`` was split; only ``m``, ``M`` and the limits in h depend on it.
        steps: at most this many products a run.
        tol: on the relative residuals.

    Cost: 2 products a Lanczos step (one forward, one adjoint); about ``4 steps`` for a block that is not dissipative.

    Source: Katende 2025, (4.1)-(4.3), Thm 4.3, Cor. 4.4; the exact limit ``1 / lambda_max((-G - G^T)^-1 G^T G)`` is
    computed by the iteration of Dinkelbach 1967.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> from lsp_callbacks.functional import residual_stability
        >>> block = residual_stability(from_matrix(torch.tensor([[2.0]])))  # x + 2x triples
        >>> round(float(block.stiffness), 6), round(float(block.gain.exp()), 6)
        (-1.0, 3.0)
        >>> G = torch.tensor([[-0.5, 2.0], [-2.0, -0.5]], dtype=torch.float64)
        >>> block = residual_stability(from_matrix(G))
        >>> round(float(block.m), 6), round(float(block.h_max), 6), round(float(block.h_exact), 6)
        (0.5, 0.235294, 0.235294)
    """
    return followed_stability(twice(jacobian), h=h, steps=steps, tol=tol)[0]


def followed_stability(
    jacobian: LinearOperator,
    vectors: Tensor | None = None,
    *,
    h: float = 1.0,
    steps: int = 12,
    tol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> tuple[ResidualStability, Tensor]:
    """Return `residual_stability` from the extreme vectors of an earlier call, and those for the next.

    The two runs go on side by side, so that one product with a block and its adjoint serves both. They start from equal
    parts of the earlier vectors and noise: the bound holds by the noise.

    Args:
        jacobian: ``hG`` with the batch axes ``(2, samples)``, the same matrices twice.
        vectors: ``(3, samples, d)`` of an earlier call; None, or another shape, starts from noise.
        h: as in `residual_stability`, like the following.
        steps: of both runs.
        tol: on the relative residuals.
        generator: of the noise, which must not be that of the vectors; None draws from a fixed seed.

    Returns:
        The numbers, and both ends of the symmetric part and the direction of the gain, ``(3, samples, d)``.
    """
    generator = generator or torch.Generator().manual_seed(0)
    samples, d = jacobian.batch[1], jacobian.shape[1]
    noise = unit(torch.randn(2, samples, d, generator=generator, dtype=jacobian.dtype).to(jacobian.device))
    start, share = noise, 1.0
    if vectors is not None and vectors.shape == (3, samples, d) and bool(torch.isfinite(vectors).all()):
        mixed = noise + torch.stack([vectors[0] + vectors[1], vectors[2]]).to(noise)
        start, share = unit(mixed), 1 / float(norm(mixed[1], -1).max())
    both = lanczos(_both(jacobian), start, steps=steps, tol=tol if steps < d else 0.0, ends=(0, -1))
    ends, growth = (_part(both, k) for k in range(2))
    lowest, top, stretched = ends.pair(0), ends.pair(-1), growth.pair(-1)
    upper = bound_beyond(growth, FAILURE / samples, 1, share).clamp_min(0).sqrt()
    gain = stretched.value.clamp_min(0).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    size = ends.values.abs().amax(-1).clamp_min(tiny)
    error = torch.where(gain == 0, 0.0, stretched.residual / (2 * gain.square()).clamp_min(tiny))
    dissipative = bool((top.value + top.residual < 0).all())
    block = ResidualStability(
        gain=gain.amax().log(),
        gain_bound=upper.amax().log(),
        stiffness=-lowest.value.amin() / 2,
        m=-top.value.amax() / h,
        dissipative=dissipative,
        residual=torch.maximum((ends.residuals[..., [0, -1]].amax(-1) / size).amax(), error.amax()),
    )
    following = torch.stack([lowest.vector, top.vector, stretched.vector])
    if not dissipative:
        return block, following
    K = _once(jacobian)
    norm_ = operator_norm(K, noise[0], steps=steps, tol=tol).value.amax() / h
    limit = 2 * block.m / norm_**2
    exact = h * _exact_limit(K, top.vector, steps, tol).amin()
    return replace(block, M=norm_, h_max=limit, h_exact=exact, cfl=h / limit), following


def _both(jacobian: LinearOperator) -> LinearOperator:
    """Return ``(K + K^T) / 2`` and ``(I + K)^T (I + K)`` of the same K, by one product with K and one with ``K^T``."""
    assert jacobian.adjoint is not None
    adjoint = jacobian.adjoint

    def apply(v: Tensor) -> Tensor:
        image = jacobian.apply(v)
        stretched = v[1] + image[1]
        back = adjoint(torch.stack([v[0], stretched]))
        return torch.stack([(image[0] + back[0]) / 2, stretched + back[1]])

    return replace(jacobian, apply=apply, adjoint=apply)


def twice(jacobian: LinearOperator) -> LinearOperator:
    """Return the operator with the batch axes ``(2, samples)``, by two products."""

    def over(product: Product) -> Product:
        shape = (*jacobian.batch, -1)
        return lambda v: torch.stack([product(part.reshape(shape)).reshape(part.shape) for part in v])

    assert jacobian.adjoint is not None
    batch = (2, math.prod(jacobian.batch))
    return replace(jacobian, apply=over(jacobian.apply), adjoint=over(jacobian.adjoint), batch=batch)


def _once(jacobian: LinearOperator) -> LinearOperator:
    """Return the operator of the first of two copies."""

    def over(product: Product) -> Product:
        return lambda v: product(torch.stack([v, torch.zeros_like(v)]))[0]

    assert jacobian.adjoint is not None
    return replace(jacobian, apply=over(jacobian.apply), adjoint=over(jacobian.adjoint), batch=(jacobian.batch[1],))


def _part(ritz: Ritz, k: int) -> Ritz:
    return Ritz(ritz.values[k], ritz.residuals[k], ritz.coefficients[k], ritz.basis[:, k], ritz.converged)


def _exact_limit(jacobian: LinearOperator, start: Tensor, steps: int, tol: float) -> Tensor:
    """Return ``min_v v^T S v / ||K v||^2`` with ``S = -K - K^T`` positive definite, for each sample.

    Dinkelbach: ``mu <- ratio(v)`` where v belongs to the smallest eigenvalue of ``S - mu K^T K``; mu falls
    monotonically, and superlinearly, to the minimum.
    """

    def ratio(v: Tensor) -> Tensor:
        image = jacobian @ v
        return -2 * (v * image).sum(-1) / image.square().sum(-1)

    mu = ratio(start)
    for _ in range(20):
        scaled = mu[..., None]
        shifted = (-1.0 * (jacobian + jacobian.T)) + (-scaled * (jacobian.T @ jacobian))
        v = lanczos(shifted, start, steps=2 * steps, tol=tol * 1e-2, ends=(0,)).pair(0).vector
        new = torch.minimum(mu, ratio(v))
        if bool(((mu - new) <= 1e-9 * mu.abs()).all()):
            return new.double()
        mu, start = new, v
    return mu.double()
