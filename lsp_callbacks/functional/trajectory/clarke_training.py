"""Generalized sensitivities of training steps whose derivative may be any of several where it jumps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.functional.network.clarke import GeneralizedNorm, RelaxedJacobian, generalized_norm


@dataclass(frozen=True)
class UncertainSlopes:
    """Units whose slope may be anything between two numbers.

    Attributes:
        rows: ``(k, P)``: what each unit sees of a displacement of the parameters.
        jump: ``(k,)``: its largest slope less the smallest.
        above: ``(k,)``: its slope at the step, less the smallest, as a share of the jump.
    """

    rows: Tensor
    jump: Tensor
    above: Tensor


@dataclass(frozen=True)
class GeneralizedSteps:
    """The derivative of T steps by their start and by noise in their gradients, at the slopes that they had.

    Attributes:
        theta: ``(n, P)``: the state after the steps by the parameters before them.
        noise: ``(n, T P)``: by a change of each step's gradient.
        out: ``(n, k)``: by what each of the units sends.
        into: ``(k, P)``: what a unit receives of the parameters at the start.
        into_noise: ``(k, T P)``: and of the noise.
        between: ``(k, k)``, strictly lower triangular: of the earlier units.
        above: ``(k,)``: its slope less the smallest, as a share of the jump.
        layer: ``(k,)``: units of one number do not feel each other.
        responses: ``||B_t||_2`` of each step.
    """

    theta: Tensor
    noise: Tensor
    out: Tensor
    into: Tensor
    into_noise: Tensor
    between: Tensor
    above: Tensor
    layer: Tensor
    responses: tuple[float, ...] = ()

    @property
    def parameters(self) -> int:
        return self.theta.shape[1]


def no_steps(state: int, parameters: int) -> GeneralizedSteps:
    """Return the state before the first step: the parameters lead to themselves, the optimizer is unperturbed."""
    none = torch.zeros(0, dtype=torch.float64)
    start = torch.eye(state, parameters, dtype=torch.float64)
    empty = none.new_zeros(0, 0)
    return GeneralizedSteps(
        start, start[:, :0], start[:, :0], empty.view(0, parameters), empty, empty, none, none.long()
    )


def one_more(
    now: GeneralizedSteps, step: Tensor, response: Tensor, prox: Tensor, loss: UncertainSlopes, after: UncertainSlopes
) -> GeneralizedSteps:
    """Return the steps with one more.

    Args:
        now: those before it.
        step: ``(n, n)``, A of the optimizer's step, see `lsp_callbacks.operators.step_jacobian`.
        response: ``(n, P)``, B, see `lsp_callbacks.operators.step_response`.
        prox: ``(P, P)``, the derivative of what is done to the parameters after it.
        loss: the units of the gradient, which act through the response.
        after: those of the prox, ``rows`` being unit vectors.
    """
    P, units = now.parameters, len(now.above)
    now = _received(now, loss)
    sent = torch.zeros(len(step), len(loss.above), dtype=torch.float64) + response @ (loss.rows.T * loss.jump)
    now = replace(
        now,
        theta=step @ now.theta,
        noise=torch.cat([step @ now.noise, response], 1),
        out=torch.cat([step @ now.out[:, :units], sent], 1),
        into_noise=torch.nn.functional.pad(now.into_noise, (0, P)),
    )
    units = len(now.above)
    now = _received(now, after)

    def moved(columns: Tensor) -> Tensor:
        return torch.cat([prox @ columns[:P], columns[P:]])

    sent = torch.nn.functional.pad(after.rows.T * after.jump, (0, 0, 0, len(step) - P))
    norm = float(torch.linalg.matrix_norm(moved(response)[:P], 2))
    return replace(
        now,
        theta=moved(now.theta),
        noise=moved(now.noise),
        out=torch.cat([moved(now.out[:, :units]), sent], 1),
        responses=(*now.responses, norm),
    )


def _received(now: GeneralizedSteps, more: UncertainSlopes) -> GeneralizedSteps:
    """Return the steps with further units; their columns of ``out`` are zeros, to be overwritten."""
    P, k, m = now.parameters, len(now.above), len(more.above)
    rows, pad = more.rows, torch.nn.functional.pad
    between = torch.cat([pad(now.between, (0, m)), pad(rows @ now.out[:P], (0, m))]) if m else now.between
    layer = int(now.layer.max()) + 1 if k else 0
    return replace(
        now,
        into=torch.cat([now.into, rows @ now.theta[:P]]),
        into_noise=torch.cat([now.into_noise, rows @ now.noise[:P]]),
        between=between,
        above=torch.cat([now.above, more.above]),
        layer=torch.cat([now.layer, torch.full((m,), layer)]),
        out=pad(now.out, (0, m)),
    )


@dataclass(frozen=True)
class GeneralizedTraining:
    """Generalized sensitivities after T steps, and their exponents.

    Attributes:
        theta: of ``d theta_T / d theta_0``, with its ends.
        noise: of ``d theta_T / d (u_1, ..., u_T)``, u a change of each gradient.
        alpha_theta: ``(1/T) log`` of both ends of theta, and of the ordinary norm; nats a step.
        alpha_u: ``2 / (T - 1) log (noise / (sum_t ||B_t||^2)^(1/2))``, of the same three; NaN where T is 1.
    """

    theta: GeneralizedNorm
    noise: GeneralizedNorm
    alpha_theta: tuple[float, float, float]
    alpha_u: tuple[float, float, float]


def generalized_training(steps: GeneralizedSteps, *, vertices: int = 12) -> GeneralizedTraining:
    """Return the generalized ``sigma^theta`` and ``sigma^u`` of a window, the largest norms over its products.

    The derivative of one step is affine in the slope of each unit that is near a kink (a residual at the bend of a
    Huber-like loss, a number at the threshold of a prox), so that of the window is multi-affine, as the Jacobian of a
    network in the slopes of its activations is: the sup is at a vertex, see
    `lsp_callbacks.functional.generalized_norm`. The product set contains Clarke's generalized Jacobian of the whole
    training map, so that the upper ends are bounds of his sup; it may be larger. Def. 6.1 takes norms of one step,
    which would let ``theta -> 2 theta`` pass; products are taken here. An exponent of 0 does not bound anything.

    Args:
        steps: at least one.
        vertices: at most so many units are enumerated.

    Cost: no gradient. Source: Katende 2025, Defs. 6.1 and 6.2; Clarke 1983, 2.6; docs/theory.md, section The Learning
    Stability Profile.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional.trajectory.clarke_training import UncertainSlopes, no_steps, one_more
        >>> from lsp_callbacks.functional.trajectory.clarke_training import generalized_training
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> bend = UncertainSlopes(one, one[0], one[0])  # a residual at the bend of a Huber loss: curvature 0 or 1
        >>> flat = UncertainSlopes(one[:0], one[0, :0], one[0, :0])
        >>> once = one_more(no_steps(1, 1), (1 - 2.5) * one, -2.5 * one, one, bend, flat)  # a rate of 2.5
        >>> result = generalized_training(once)
        >>> round(float(result.theta.ordinary), 6), round(float(result.theta.lower), 6), result.theta.exact
        (1.5, 1.5, True)
    """
    T = len(steps.responses)
    if not T:
        raise ValueError("no step was taken: the sensitivity of training needs at least one")
    theta, noise = (
        generalized_norm(_centred(steps, matrix, into), vertices=vertices)
        for matrix, into in ((steps.theta, steps.into), (steps.noise, steps.into_noise))
    )
    responses = math.sqrt(sum(norm**2 for norm in steps.responses))
    travelled = (T - 1) / 2 or math.nan
    return GeneralizedTraining(
        theta,
        noise,
        _three(theta, 1.0, float(T)),
        _three(noise, responses, travelled),
    )


def _three(norm: GeneralizedNorm, unit: float, steps: float) -> tuple[float, float, float]:
    assert norm.upper is not None
    lower, upper, ordinary = (
        math.log(float(x) / unit) / steps if x > 0 and unit > 0 else math.nan
        for x in (norm.lower, norm.upper, norm.ordinary)
    )
    return lower, upper, ordinary


def _centred(steps: GeneralizedSteps, matrix: Tensor, into: Tensor) -> RelaxedJacobian:
    """Return the relaxation about the centres of the slopes: ``E = above - 1/2`` in units of the jump."""
    P, k = steps.parameters, len(steps.above)
    shift = 0.5 - steps.above
    eye = torch.eye(k, dtype=torch.float64)
    out = steps.out[:P]
    # x = C v + T (E + S) x is (I - T S) x = C v + T E x; the output feels (E + S) x.
    both = torch.linalg.solve_triangular(
        eye - steps.between * shift, torch.cat([into, steps.between], 1), upper=False, unitriangular=True
    )
    received, between = both[:, : into.shape[1]], both[:, into.shape[1] :]
    return RelaxedJacobian(
        jacobian=matrix[:P] + (out * shift) @ received,
        into=received,
        out=out + (out * shift) @ between,
        between=between,
        radius=torch.full((k,), 0.5, dtype=torch.float64),
        real=steps.above - 0.5,
        layer=steps.layer,
        units=k,
    )
