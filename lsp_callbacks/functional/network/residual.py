"""How large a residual step may be: stiffness, gain and CFL margin of ``x + h g(x)``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, identity_like, lanczos, operator_norm

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
    generator = torch.Generator(jacobian.device).manual_seed(0)
    start = torch.randn(
        *jacobian.batch, jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device, generator=generator
    )
    symmetric = 0.5 * (jacobian + jacobian.T)
    ends = lanczos(symmetric, start, steps=steps, tol=tol, ends=(0, -1))
    growth, top_residual = ends.values[..., -1], ends.residuals[..., -1]
    step, failure = identity_like(jacobian) + jacobian, FAILURE / math.prod(jacobian.batch)
    gain = operator_norm(step, steps=steps, tol=tol, failure=failure, generator=generator.manual_seed(0))
    assert gain.upper is not None
    size = ends.values.abs().amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    residual = torch.maximum((ends.residuals[..., [0, -1]].amax(-1) / size).amax(), (gain.residual / gain.value).amax())
    dissipative = bool((growth + top_residual < 0).all())
    block = ResidualStability(
        gain=gain.value.amax().log(),
        gain_bound=gain.upper.amax().log(),
        stiffness=(-ends.values[..., 0]).amax() / 2,
        m=-growth.amax() / h,
        dissipative=dissipative,
        residual=residual,
    )
    if not dissipative:
        return block
    norm = operator_norm(jacobian, start, steps=steps, tol=tol).value.amax() / h
    limit = 2 * block.m / norm**2
    exact = h * _exact_limit(jacobian, ends.pair(-1).vector, steps, tol).amin()
    return replace(block, M=norm, h_max=limit, h_exact=exact, cfl=h / limit)


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
