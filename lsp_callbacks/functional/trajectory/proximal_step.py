"""One proximal gradient step: what it does to a small difference, and to the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import Eigenpair, LinearOperator, lanczos, operator_norm


def proximal_gain(step: LinearOperator, prox: LinearOperator, *, steps: int = 6, tol: float = 1e-2) -> Eigenpair:
    """Return ``||D prox . A||_2``, the most that one step stretches a small difference; a lower bound.

    Args:
        step: A, the derivative of the optimizer's step in the parameters, with its adjoint.
        prox: D, with its adjoint.
        steps: of Lanczos on ``A^T D^T D A``, at most.
        tol: on its relative residual.

    Cost: two Hessian products a step.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> A, D = (from_matrix(torch.diag(torch.tensor(d))) for d in ([-3.0, 0.5], [0.0, 1.0]))  # a projection
        >>> round(float(proximal_gain(A, D).value), 6)
        0.5
    """
    through = LinearOperator(
        step.shape,
        lambda v: (prox @ (step @ v).to(prox.dtype)).to(v),
        lambda w: step.T @ (prox.T @ w.to(prox.dtype)).to(w),
        dtype=step.dtype,
        device=step.device,
    )
    return operator_norm(through, steps=steps, tol=tol)


@dataclass(frozen=True)
class ProximalBounds:
    """Bounds on one proximal gradient step, from the curvature at its start.

    Attributes:
        gain: a bound of `proximal_gain`; None where the theory promises none, then
        reason: says why.
        descent: c of ``F(theta+) - F(theta) <= -c ||theta+ - theta||^2``; negative where nothing is promised.
    """

    gain: float | None
    reason: str | None
    descent: float


def proximal_bounds(
    hessian: LinearOperator, lr: float, *, modulus: float = 0.0, along: float | None = None, steps: int = 8
) -> ProximalBounds:
    """Return what holds of ``prox_{lr R}(theta - lr grad L)`` for a convex R, by the curvature at its start.

    - nonexpansive: with the spectrum of the Hessian in ``[low, high]``, the gain is at most
      ``max(1 - lr low, lr high - 1) / (1 + lr modulus)``. That is at most 1 for a convex loss and ``lr < 2 / high``;
      for a loss that is not convex only if R is strongly convex by enough. Above 1 it is refused.
    - descent: ``c = 1 / lr - high / 2``, for losses that are not convex, too.

    ``low`` and ``high`` are the ends of one Lanczos run, widened by their residuals, and the curvature ``along`` the
    step. Ritz values lie inside the spectrum: what they refute is refuted, and what they confirm is confirmed only as
    far as the run has converged, and at the step's start.

    Args:
        hessian: of the loss at the step's start, coupled weight decay included.
        lr: the rate.
        modulus: of R's strong convexity.
        along: ``<grad L(theta+) - grad L(theta), d> / ||d||^2``, d the step.
        steps: of Lanczos.

    Cost: ``steps`` Hessian products. Source: Katende 2025, Sec. 6.6; docs/theory.md, section What does not hold as
    printed, claim 8.
    """
    generator = torch.Generator(hessian.device).manual_seed(0)
    start = torch.randn(hessian.shape[1], dtype=hessian.dtype, device=hessian.device, generator=generator)
    ends = lanczos(hessian, start, steps=steps, ends=(0, -1), tol=1e-3)
    seen = [] if along is None else [along]
    low = min(float(ends.values[0] - ends.residuals[0]), *seen, math.inf)
    high = max(float(ends.values[-1] + ends.residuals[-1]), *seen, -math.inf)
    gain = max(1 - lr * low, lr * high - 1) / (1 + lr * modulus)
    reason = None
    if not gain <= 1 + 1e-6:
        reason = (
            f"the loss is not convex: its curvature goes down to {low:.3g}"
            if 1 - lr * low >= lr * high - 1
            else f"the rate {lr:.3g} is not below 2 / {high:.3g}"
        )
    return ProximalBounds(gain if reason is None else None, reason, 1 / lr - high / 2)


def descent_constant(before: Tensor, after: Tensor, distance: Tensor) -> Tensor:
    """Return ``(F(theta) - F(theta+)) / ||theta+ - theta||^2``, the c of one real step."""
    return (before.double() - after.double()) / distance.double().square()
