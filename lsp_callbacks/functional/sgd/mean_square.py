"""The second moment of SGD frozen at one point: an exact, cheap, sufficient criterion for stability."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.low_rank_noise import Array, top_by_noise
from lsp_callbacks.functional.sgd.modes import PLAIN, Modes, UpdateRule, drawn_from, in_units, noise_share

#: Tolerance of the first eigenvalues of a search.
LOOSE = 1e-3
Numbers = TypeVar("Numbers", Tensor, Array)
Superoperator = Callable[[Tensor], Tensor]
TopAgainst = Callable[[Tensor, "Tensor | None", Tensor, float], tuple[float, Tensor]]


def second_moment(
    modes: Modes,
    batch_size: int,
    replacement: bool = False,
    population: int | None = None,
    *,
    weight_decay: float = 0.0,
) -> Superoperator:
    """Return the map ``D(X) = E[H' X H']`` over batches drawn independently, for symmetric X, ``(r, r)``.

    ``D(X) = (1 - p) H X H + p (1/N) sum_i Y_i^T (Y_i X Y_i^T) Y_i``, ``p = (N' - B) / (B (N' - 1))`` without
    replacement from ``N'`` (``population``, or all samples), ``1 / B`` with. Coupled decay adds
    ``wd (H X + X H) + wd^2 X``. Of samples that batch statistics tie together p falls to ``p w^2``, and whole groups
    are a second such sum of weight ``p B / G - p w^2``, see `sgd_exponent`.

    Raises:
        ValueError: if a batch is larger than what it is drawn from.

    Cost: ``O(N outputs r^2)`` a product. Source: Mulayoff & Michaeli 2024; docs/theory.md, section The exponent of SGD,
    frozen at the weights.
    """
    share = noise_share(drawn_from(modes.samples, batch_size, population), batch_size, replacement)
    return _superoperator(modes, *_weights(modes, batch_size, share, weight_decay))


def _superoperator(modes: Modes, p: float, tied: float, diagonal: Tensor) -> Superoperator:
    n, outputs, r = modes.factor.shape
    rows = modes.factor.flatten(0, 1)
    # What a sample stands for is in the square of its row: its fourth power would hold it twice.
    push = rows if modes.chance is None else (modes.factor * modes.chance[..., None].to(rows)).flatten(0, 1)
    whole = modes.factor.reshape(n // modes.together, modes.together * outputs, r)

    def apply(x: Tensor) -> Tensor:
        if not p and not tied:
            return diagonal * x
        half = rows @ x
        if outputs == 1:
            weighted = (half * rows).sum(1, keepdim=True) * push
        else:
            blocks = half.view(n, outputs, r) @ modes.factor.mT
            weighted = (blocks @ push.view(n, outputs, r)).flatten(0, 1)
        if tied:
            pushed = ((half.view(whole.shape) @ whole.mT) @ whole).flatten(0, 1)
            weighted = p * weighted + tied / modes.together * pushed
            return torch.addmm(diagonal * x, rows.mT, weighted, alpha=1 / n)
        return torch.addmm(diagonal * x, rows.mT, weighted, alpha=p / n)

    return apply


def _weights(modes: Modes, batch_size: int, p: float, weight_decay: float) -> tuple[float, float, Tensor]:
    """Return the weights of both sums of `second_moment`, and all that is elementwise, by the `noise_share` p."""
    h, tied = modes.curvatures, 0.0
    if modes.together > 1:
        groups, share = modes.shares(batch_size)
        p, tied = p * share, p * (batch_size / groups - share)
    # (1 - p) h_i h_j + wd (h_i + h_j) + wd^2.
    return p, tied, (h + weight_decay)[:, None] * (h + weight_decay) - (p + tied) * h[:, None] * h


def _top_against(modes: Modes, batch_size: int, share: float, decay: float) -> TopAgainst:
    """Return the function that finds the largest x at which ``x source + rest - D`` is singular, and the X.

    ``<X, source X> = 1``.

    Args:
        modes: of `reduced_modes`.
        batch_size, decay: as in `second_moment`.
        share: the `noise_share` of the batches.
    """
    p, tied, diagonal = _weights(modes, batch_size, share, decay)
    chance = 1.0 if modes.chance is None else modes.chance.to(modes.factor)
    low_rank = modes.factor.shape[1] == 1 and p > 0 and not tied
    rows = modes.factor[:, 0] * (p / len(modes.factor) * chance) ** 0.25 if low_rank else modes.factor[:, 0]
    rows = rows[rows.any(1)]

    def top(source: Tensor, rest: Tensor | None, start: Tensor, tol: float) -> tuple[float, Tensor]:
        if low_rank and tol > LOOSE:
            fixed = diagonal if rest is None else diagonal - rest
            pair = top_by_noise(rows.numpy(), source.numpy(), fixed.numpy(), tol)
            if pair is not None:
                return pair[0], torch.from_numpy(pair[1])
        d, root = _superoperator(modes, p, tied, diagonal), source.rsqrt()
        shift = None if rest is None else -rest * root**2

        def scaled(x: Tensor) -> Tensor:
            image = root * d(root * x)
            return image if shift is None else image.addcmul_(shift, x)

        value, vector = _top(scaled, start / root, tol)
        return value, root * vector

    return top


def mean_square_lr(
    modes: Modes,
    *,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    replacement: bool = False,
    population: int | None = None,
    tol: float = 1e-8,
) -> float:
    """Return the largest rate up to which ``E ||v||^2`` of i.i.d. batches stays bounded.

    It is at most the critical rate of lambda. The stationary moments ``P = E v v^T``, ``C = E v m^T``, ``M = E m
    m^T`` obey equations in which all but ``D(P) = E u u^T`` is elementwise in the basis of ``H = diag(h)``. Without C
    and M they read ``D(P) = t(lr) * P``: the edge is the smallest rate at which the symmetric operator ``t^-1/2 *
    D(t^-1/2 * X)`` has top eigenvalue 1. For plain SGD and heavy ball ``t = alpha / lr + gamma``, and one Lanczos run
    gives ``1 / lr``.

    Args:
        modes: of `reduced_modes`.
        batch_size: samples of a batch.
        rule: of the optimizer.
        replacement: within a batch.
        population: as in `sgd_exponent`; here exact for any ``population``.
        tol: relative, of the rate: it is too low by at most that, as the error bound of the eigenvalue is added to it.

    Returns:
        The rate; inf for a collapsed network (rank 0) or where nothing pushes (``dampening = 1``).

    Cost: 10 to 60 products with `second_moment`; at a tolerance above 1e-3, with one output a sample, 5 to 10 steps
    of `top_by_noise`. Source: Mulayoff & Michaeli 2024 for plain SGD; docs/theory.md, section The exponent of SGD,
    frozen at the weights.
    """
    modes, rule, unit = in_units(modes, rule)
    share = noise_share(drawn_from(modes.samples, batch_size, population), batch_size, replacement)
    return rate_of_bounded_moments(modes, batch_size, share, rule, tol) / unit


def rate_of_bounded_moments(modes: Modes, batch_size: int, share: float, rule: UpdateRule, tol: float) -> float:
    """Return `mean_square_lr` of modes as `in_units` gives them, by the `noise_share` of the batches."""
    h = modes.curvatures + rule.weight_decay
    top_against = _top_against(modes, batch_size, share, rule.weight_decay)
    if not len(h) or (rule.momentum and rule.dampening == 1 and not rule.direct):
        return math.inf
    if not (rule.nesterov or rule.direct or rule.decoupled_decay):
        top, _ = top_against(*affine_in_rate(h, rule), torch.eye(len(h), dtype=h.dtype), tol)
        return rule.correction / top
    # Below the full-batch edge t is positive, and the mean-square edge lies below it. The quotient <X, D X> / <X, t X>
    # of a fixed X is at most the top eigenvalue: its rate is an upper bound, and of a top eigenvector at a rate that
    # is e off, one that is e^2 off. So the search comes down from above.
    high = gd_critical_lr(modes, rule)
    most, x, accuracy = math.log(high) - tol, torch.eye(len(h), dtype=h.dtype), max(tol, LOOSE)
    log_lr = most
    for k in range(100):
        source = stationary_factor(h.double(), math.exp(log_lr), rule).to(h)
        top, x = top_against(source, None, x.to(h), accuracy / 2)
        if not math.isfinite(top):
            return math.nan
        if not k and top <= 1:
            return high
        if top <= 1 - tol:  # a loose eigenvalue has led below
            log_lr = min(log_lr - 4 * math.log(top), most)
            continue
        x = x.double()

        def excess(at: float) -> float:
            return math.log(top / float((stationary_factor(h.double(), math.exp(at), rule) * x).mul_(x).sum()))  # noqa: B023

        upper = _illinois(excess, log_lr, accuracy / 10)
        fall, log_lr = log_lr - upper, upper
        if accuracy == tol and fall <= 0.03 * tol**0.5:
            return math.exp(log_lr)
        if accuracy > tol and fall <= 0.03:
            accuracy, log_lr = tol, min(log_lr + 2 * LOOSE, most)
    return math.nan


def affine_in_rate(h: Numbers, rule: UpdateRule) -> tuple[Numbers, Numbers | None]:
    """Return alpha and gamma of `mean_square_lr`, ``t = alpha c / lr + gamma``; None for a gamma of 0.

    Args:
        h: curvatures, with coupled decay.
        rule: whose Nesterov's momentum, and direct share of the gradient, are taken for plain momentum, and whose
            decoupled decay for none.
    """
    beta = rule.momentum
    gain = 1 - rule.dampening * bool(beta) + (1 - beta) * rule.direct
    alpha = (1 - beta) / gain * (h[:, None] + h)
    return alpha, beta * (h[:, None] ** 2 + h**2 - 2 * beta * h[:, None] * h) / (1 - beta**2) if beta else None


def gd_critical_lr(modes: Modes, rule: UpdateRule = PLAIN) -> float:
    """Return the rate at which full-batch descent loses stability: a mode's step has the eigenvalue -1; exact.

    ``(1 + delta + b1 h)(1 + beta) - phi b2 h`` vanishes there, which is affine in the rate. inf at rank 0.
    """
    if not modes.rank:
        return math.inf
    modes, rule, unit = in_units(modes, rule)
    h = modes.curvatures + rule.weight_decay
    delta, phi, beta, b1, b2 = rule.coefficients(torch.ones_like(h))
    slope = 2 * (1 + beta) - ((1 + delta + b1 * h) * (1 + beta) - phi * b2 * h)
    return float((2 * (1 + beta) / slope).min()) / unit


def second_moment_exponent(
    modes: Modes,
    lr: float,
    *,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    replacement: bool = False,
    population: int | None = None,
    tol: float = 1e-9,
    iterations: int = 20_000,
) -> float:
    """Return ``0.5 log rho(T)``, T the second moment of one step: an upper bound of lambda, nats per step.

    Args:
        lr: one rate.
        tol: relative residual; the value of plain SGD is then exact to its square where the top is separated.
        iterations: at most this many, with momentum.

    Returns:
        NaN at rank 0, or where the power iteration that momentum needs did not converge.

    Cost: a few dozen products with `second_moment`; with momentum one an iteration, slow near a critical rate.
    """
    d = second_moment(modes, batch_size, replacement, population, weight_decay=rule.weight_decay)
    if not modes.rank:
        return math.nan
    h = modes.curvatures + rule.weight_decay
    delta, phi, beta, b1, b2 = rule.coefficients(lr)
    eye = torch.eye(modes.rank, dtype=torch.float64)
    if not beta:
        linear = delta**2 + delta * b1 * (h[:, None] + h)
        top, _ = _top(lambda x: linear * x + b1**2 * d(x), eye, tol, steps=400)
        return 0.5 * math.log(max(top, 1e-300))
    # Times the rate, m has the units of v. T preserves a cone: rho is an eigenvalue; others may share its modulus.
    phi = rule.coefficients(1.0)[1]
    b2, left = b2 * lr, h[:, None]
    state, radius = torch.stack([eye, 0 * eye, eye]), 1.0
    for _ in range(iterations):
        p, c, m = state
        hc, dp = left * c, d(p)
        cross = delta * phi * (c + c.mT) + delta * b1 * (left + h) * p + phi * b1 * (hc + hc.mT)
        image = torch.stack(
            [
                delta**2 * p + phi**2 * m + b1**2 * dp + cross,
                delta * beta * c
                + delta * b2 * p * h
                + phi * beta * m
                + phi * b2 * hc.mT
                + b1 * beta * hc
                + b1 * b2 * dp,
                beta**2 * m + beta * b2 * (hc + hc.mT) + b2**2 * dp,
            ]
        )
        radius = float((image[0].trace() + image[2].trace()) / (p.trace() + m.trace()))
        residual = float((image - radius * state).norm() / state.norm())
        if residual <= tol * radius:
            return 0.5 * math.log(radius)
        # The shift takes those others away from the circle, and oscillations with them.
        state = image + radius * state
        # An antisymmetric rounding error in P or M is outside of the cone, and grows.
        state = torch.stack([state[0] + state[0].mT, 2 * state[1], state[2] + state[2].mT]) / state.norm()
    return math.nan


def stationary_factor(h: Numbers, lr: float, rule: UpdateRule) -> Numbers:
    """Return ``t`` of `mean_square_lr`, ``(r, r)``: Cramer eliminates C and M for each pair of modes."""
    delta, phi, beta, b1, b2 = rule.coefficients(lr)
    left, right = h[:, None], h[None, :]
    feed, square = beta * b2 / (1 - beta**2), b2**2 / (1 - beta**2)  # M = feed (h_i C_ij + h_j C_ji) + square D
    direct = 1 - delta * beta - b1 * beta * h - phi * beta * feed * h
    other = -phi * b2 / (1 - beta**2) * h  # direct_i C_ij + other_j C_ji = (delta b2 h_j) P + drive D, and its mirror
    drive = phi * beta * square + b1 * b2
    det = direct[:, None] * direct - other[:, None] * other
    by_p = delta * b2 * (right * direct[None, :] - other[None, :] * left) / det
    by_d = drive * (direct[None, :] - other[None, :]) / det
    weight = (phi**2 * feed + phi * b1) * left + delta * phi
    through_p, through_d = weight * by_p, weight * by_d
    kept = 1 - delta**2 - delta * b1 * (left + right) - through_p - through_p.T
    return kept / (phi**2 * square + b1**2 + through_d + through_d.T)


def _top(operator: Superoperator, start: Tensor, tol: float, steps: int = 200) -> tuple[float, Tensor]:
    """Return the largest eigenvalue over symmetric matrices, and its matrix; see `mean_square_lr` for ``tol``.

    Lanczos by its three terms alone. The top belongs to a symmetric matrix, as the maps are positive: antisymmetric
    rounding errors lie below. Without reorthogonalisation the basis is lost only towards eigenvectors that have been
    found, and the first at the top ends the search.
    """
    r = len(start)
    generic = torch.randn(r, r, dtype=start.dtype, generator=torch.Generator().manual_seed(0))
    q = start / start.norm() + 1e-3 / r * (generic + generic.mT)
    basis, diagonal, coupling, look = [q / q.norm()], [], [0.0], 3
    while True:
        q = basis[-1]
        w = operator(q)
        diagonal.append(float(torch.dot(w.view(-1), q.view(-1))))
        w.sub_(q, alpha=diagonal[-1]).sub_(basis[-2] if len(basis) > 1 else 0, alpha=coupling[-1])
        coupling.append(float(torch.linalg.vector_norm(w)))
        k = len(diagonal)
        last = k == steps or not coupling[-1] > 4 * torch.finfo(q.dtype).eps * max(
            map(abs, diagonal)
        )  # exhausted, or not finite
        if last or k == look:
            look += 3 + k // 5
            projected = torch.diag(start.new_tensor(diagonal)) + torch.diag(start.new_tensor(coupling[1:-1]), -1)
            if not math.isfinite(coupling[-1]):
                return math.nan, q
            values, vectors = torch.linalg.eigh(projected)  # reads the lower triangle
            top, residual = float(values[-1]), coupling[-1] * abs(float(vectors[-1, -1]))
            # A Ritz value errs by at most its residual, and by at most the square of that over the gap.
            gap = top - float(values[-2]) if k > 1 else 0.0
            # After few steps the second value is too low, and the gap too wide, to be relied on.
            bound = min(residual, residual**2 / gap) if gap > 0 and tol <= LOOSE else residual
            if last or (residual <= tol**0.5 * top and bound <= tol * top):
                vector = torch.tensordot(vectors[:, -1], torch.stack(basis), 1)
                # The basis has lost orthogonality. What the eigenvalue may lack is added: the rate errs downwards.
                return top + bound, vector / torch.linalg.vector_norm(vector)
        basis.append(w.div_(coupling[-1]))


def _illinois(f: Callable[[float], float], high: float, tol: float) -> float:
    """Return the root of an increasing function below ``high``, where ``f(high) >= 0``."""
    at_high = f(high - tol)
    if at_high <= 0:
        return high
    low = high
    at_low = at_high
    while at_low > 0:  # f falls about as fast as its argument
        high, at_high = low, at_low
        low -= 1.2 * at_low + 0.1
        at_low = f(low)
    side = 0
    while high - low > tol:
        middle = high - at_high * (high - low) / (at_high - at_low)
        at = f(middle)
        if abs(at) <= tol:
            return middle
        if at > 0:
            high, at_high, at_low, side = middle, at, at_low / (2 if side == 1 else 1), 1
        else:
            low, at_low, at_high, side = middle, at, at_high / (2 if side == -1 else 1), -1
    return (low + high) / 2
