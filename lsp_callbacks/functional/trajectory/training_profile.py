"""How perturbations of the parameters and of the gradients propagate through training steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.functional.trajectory.norm_intervals import gaussian_form_interval, norm_by_random_rows
from lsp_callbacks.linalg import LinearOperator, push
from lsp_callbacks.linalg.logs import add, log, rescale

#: Probability with which an interval may fail.
FAILURE = 1e-3


@dataclass(frozen=True)
class Tangents:
    """Directions on their way through training steps.

    Attributes:
        frame: ``(r, n)``, pushed by ``z <- A_t z`` from displacements that were orthonormal, divided by
            ``exp(frame_log)``; n the size of the optimizer's state, parameters first.
        noise: ``(m, n)``, driven by ``z <- A_t z + B_t xi_t`` from 0, divided by ``exp(noise_log)``.
        frame_log: see ``frame``.
        noise_log: see ``noise``.
        random: the first so many rows of the frame are random directions.
        size: P, of the parameters.
        driven: ``sum_t ||B_t xi_t||^2 / P`` over the steps, in the parameters, a mean over the rows.
        steps: T, that were taken.
    """

    frame: Tensor
    noise: Tensor
    frame_log: float
    noise_log: float
    random: int
    size: int
    driven: float
    steps: int


@dataclass(frozen=True)
class TrainingProfile:
    """Sensitivities after T steps; those of one finite window.

    Attributes:
        steps: T.
        sigma_theta: the norm of ``d theta_T / d theta_0`` on the frame: a lower bound of its norm.
        sigma_theta_bound: one from above, by random directions alone: wide.
        mean_square: ``||d theta_T / d theta_0||_F^2 / P``, by which a random perturbation grows in the mean square; an
            unbiased estimate.
        mean_square_error: its standard error.
        sigma_u: ``||d theta_T / d(u_1 ... u_T)||_F / sqrt P``: root mean square displacement of a parameter at the end
            where each entry of each step's gradient had noise of variance 1, independently.
        sigma_u_error: its standard error.
        sigma_u_lower: an end of its interval, which fails with `FAILURE`.
        sigma_u_bound: the other one.
        alpha_theta: ``(1/T) log sigma_theta``, a lower bound, nats a step; it is finite also where that has overflowed.
        alpha_theta_bound: the same of ``sigma_theta_bound``.
        alpha_mean_square: ``(1/2T) log mean_square``.
        alpha_mean_square_error: its standard error.
        alpha_u: ``log(sigma_u^2 / sum_t E||B_t xi_t||^2) / (T - 1)``: how the noise of a step has grown, over the
            (T - 1) / 2 steps that it has travelled on the average. 0 where A is the identity; for ``A = c I`` it is
            log c as c tends to 1, and nearer to 0 below. NaN where T is 1.
        alpha_u_error: its standard error.
        alpha_u_bound: what it would be at ``sigma_u_bound``.
    """

    steps: int
    sigma_theta: Tensor
    sigma_theta_bound: Tensor
    mean_square: Tensor
    mean_square_error: Tensor
    sigma_u: Tensor
    sigma_u_error: Tensor
    sigma_u_lower: Tensor
    sigma_u_bound: Tensor
    alpha_theta: Tensor
    alpha_theta_bound: Tensor
    alpha_mean_square: Tensor
    alpha_mean_square_error: Tensor
    alpha_u: Tensor
    alpha_u_error: Tensor
    alpha_u_bound: Tensor


@dataclass(frozen=True)
class NoiseSeen:
    """The exact part of ``K = sum_s S_s S_s^T``, ``S_s = A_T ... A_(s+1) B_s``, on a subspace of the parameters.

    Attributes:
        basis: ``(k, n)``, orthonormal, ``n >= P``; found without the rows of `Tangents.noise`.
        trace: ``tr(Q K Q^T)``, Q the basis, divided by ``exp(2 noise_log)``, as K is in the next.
        largest: a bound of the largest eigenvalue of K.
    """

    basis: Tensor
    trace: float
    largest: float


def random_tangents(
    state: int,
    parameters: int,
    *,
    vectors: int,
    noise: int | None = None,
    generator: torch.Generator,
    sharp: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tangents:
    """Return random displacements of the parameters and, orthogonal to them, the sharp one.

    Nothing else is perturbed.

    Args:
        state: size of the optimizer's state, the parameters included.
        parameters: P.
        vectors: how many random directions; no more than P.
        noise: how many rows of noise; None is as many.
        generator: on the CPU.
        sharp: a further direction, ``(P,)``.
        dtype: of the vectors.
        device: of the vectors.
    """
    k = min(vectors, parameters)
    rows = torch.randn(k, parameters, generator=generator, dtype=dtype).to(device)
    if sharp is not None and k < parameters:
        rows = torch.cat([rows, sharp.to(rows)[None]])
    q, r = torch.linalg.qr(rows.mT)
    q = q.mT * torch.where(r.diagonal() < 0, -1.0, 1.0)[:, None].to(q)  # so that random rows are uniform
    if len(q) > k and not bool(r.diagonal()[k].abs() > 1e-6 * torch.linalg.vector_norm(rows[k])):
        q = q[:k]
    frame = torch.cat([q, q.new_zeros(len(q), state - parameters)], dim=1)
    return Tangents(frame, q.new_zeros(noise or vectors, state), 0.0, 0.0, k, parameters, 0.0, 0)


def push_tangents(now: Tangents, step: LinearOperator, noise: LinearOperator, generator: torch.Generator) -> Tangents:
    """Return the tangents one step further.

    Args:
        now: before it.
        step: ``A_t``, see `lsp_callbacks.operators.step_jacobian`.
        noise: ``B_t``, see `lsp_callbacks.operators.step_response`.
        generator: of the noise, on the CPU.

    Cost: a product with ``A_t`` for each row, and one with ``B_t`` for each row of noise.
    """
    frame, frame_log = rescale(push(step, now.frame), now.size)
    xi = torch.randn(len(now.noise), now.size, generator=generator, dtype=now.noise.dtype).to(now.noise.device)
    driven = push(noise, xi)
    carried = push(step, now.noise) if now.steps else now.noise
    new, noise_log = add(carried, now.noise_log, driven, size=now.size)
    return replace(
        now,
        frame=frame,
        noise=new,
        frame_log=now.frame_log + frame_log,
        noise_log=noise_log,
        driven=now.driven + float(_squares(driven, now.size).mean()) / now.size,
        steps=now.steps + 1,
    )


def training_profile(state: Tangents, seen: NoiseSeen | None = None) -> TrainingProfile:
    """Return the sensitivities of the parameters to their start and to the noise.

    What was pushed went forward only, so the norm of ``A_T ... A_1`` is bounded from below by that on the frame, and
    from above by what random directions leave undetermined (`norm_by_random_rows`), which is far; both ends are near
    each other where products with its adjoint are taken, see `lsp_callbacks.operators.trajectory.window`. Its Frobenius
    norm is estimated without bias, ``E ||A q||^2 = ||A||_F^2 / P`` for a random unit q. The noise likewise: ``E
    ||v_T||^2 = tr K``, of which a part may be known exactly. Where each step contracts by c, and ``B = -eta I``,
    ``sigma_u`` is ``eta sqrt((1 - c^(2T)) / (1 - c^2))``; what a gradient that is off by the *same* vector at each step
    can do is more, up to ``eta (1 - c^T) / (1 - c)``.

    The exponents are divided by the steps that were travelled, not by L + T; they belong to a finite window, for which
    the limsup of the definition does not exist. ``[[1, 1], [0, 1]]`` at each step gives a norm that grows like T and an
    exponent that falls to 0: an exponent of 0 does not bound the sensitivity.

    Under momentum and its like the perturbation starts in the parameters, and is read off the parameters.

    Args:
        state: the tangents after at least one step.
        seen: what is known of the noise beside its rows.

    Raises:
        ValueError: before the first one.

    Source: Katende 2025, Sec. 2 and Thm 5.2 (3); Hutchinson 1990; docs/theory.md, section The Learning Stability
    Profile.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> from lsp_callbacks.functional import push_tangents, random_tangents, training_profile
        >>> generator = torch.Generator().manual_seed(0)
        >>> now = random_tangents(2, 2, vectors=2, generator=generator)
        >>> for _ in range(3):  # a rate of 0.1 on a curvature of 5
        ...     now = push_tangents(now, from_matrix(0.5 * torch.eye(2)), from_matrix(-0.1 * torch.eye(2)), generator)
        >>> result = training_profile(now)
        >>> round(float(result.sigma_theta), 6), round(float(result.alpha_theta), 6)  # 0.5^3, log 0.5
        (0.125, -0.693147)
    """
    if not state.steps:
        raise ValueError("nothing was pushed: a profile needs at least one step")
    steps, size = state.steps, state.size
    frame = state.frame[:, :size].double()
    top = 0.5 * torch.linalg.eigvalsh((frame @ frame.mT).cpu())[-1].clamp_min(0).log() + state.frame_log
    mean, error = _mean(_squares(frame[: state.random], size).cpu(), 1 - state.random / size)
    growth = mean.log() + 2 * state.frame_log
    noise, noise_error, *ends = _noise(state, seen)
    lower, upper = (0.5 * end.log() + state.noise_log for end in ends)
    random = frame[: state.random]
    widest = float(torch.linalg.eigvalsh((random @ random.mT).cpu())[-1].clamp_min(0).sqrt())
    widest = norm_by_random_rows(widest, state.random, size, failure=FAILURE)
    bound = torch.tensor(log(widest) + state.frame_log, dtype=torch.float64)
    sigma_u = 0.5 * noise.log() + state.noise_log
    # As large as the noise of T steps that does not travel; on the average they have travelled (T - 1) / 2 steps.
    brought = 0.5 * math.log(state.driven) if state.driven else math.nan
    left = (steps - 1) / 2 or math.nan
    return TrainingProfile(
        steps=steps,
        sigma_theta=top.exp(),
        sigma_theta_bound=bound.exp(),
        mean_square=growth.exp(),
        mean_square_error=growth.exp() * error,
        sigma_u=sigma_u.exp(),
        sigma_u_error=sigma_u.exp() * noise_error / 2,
        sigma_u_lower=lower.exp(),
        sigma_u_bound=upper.exp(),
        alpha_theta=top / steps,
        alpha_theta_bound=bound / steps,
        alpha_mean_square=growth / (2 * steps),
        alpha_mean_square_error=error / (2 * steps),
        alpha_u=(sigma_u - brought) / left,
        alpha_u_error=noise_error / (2 * left),
        alpha_u_bound=(upper - brought) / left,
    )


def function_growth(before: Tensor, after: Tensor, log: float, steps: int) -> tuple[Tensor, Tensor]:
    """Return ``(1/T) log(||J_T A_T ... A_1 V||_F / ||J_0 V||_F)``, the growth in function space, and its error.

    In nats a step. Over all parameters of an overparameterised model the directions that no sample sees hold the
    growth at 1; the outputs do not see them, so that this one is negative where the steps contract what the data feel.

    Args:
        before: ``(k,)``, squared norms of what k random directions do to the outputs at the start.
        after: of what the pushed ones, divided by ``exp(log)``, do to them at the end.
        log: see ``after``.
        steps: T.

    Returns:
        The exponent and its standard error, by the spread of the directions about a common ratio.
    """
    ratio, k = after.sum() / before.sum(), len(after)
    error = ((after - ratio * before).square().sum() / (k * max(k - 1, 1))).sqrt() / before.mean()
    return (0.5 * ratio.log() + log) / steps, error / ratio / (2 * steps)


def _noise(state: Tangents, seen: NoiseSeen | None) -> tuple[Tensor, ...]:
    """Return ``tr K / P exp(-2 noise_log)``, its relative standard error and the ends of its interval."""
    rows, trace, largest = state.noise[:, : state.size], 0.0, math.inf
    if seen is not None:
        trace, largest = seen.trace, seen.largest
        basis = seen.basis[:, : state.size].to(rows)
        for _ in range(2):  # to rounding
            rows = rows - (rows @ basis.mT) @ basis
    squares = _squares(rows, state.size).cpu()
    mean = trace + squares.mean()
    error = (squares.var() / len(squares)).sqrt() / mean
    ends = gaussian_form_interval(squares, largest=largest, failure=FAILURE)
    return mean / state.size, error, *((trace + torch.tensor(ends, dtype=torch.float64)) / state.size)


def _squares(rows: Tensor, size: int) -> Tensor:
    return torch.linalg.vector_norm(rows[:, :size], dim=1, dtype=torch.float64).square()


def _mean(values: Tensor, unseen: float) -> tuple[Tensor, Tensor]:
    """Return the mean over rows that see all but the share ``unseen`` of the directions, and its relative error."""
    mean = values.mean()
    if unseen == 0:
        return mean, torch.zeros_like(mean)
    return mean, (values.var() * unseen / len(values)).sqrt() / mean
