"""SGD frozen at one point: the exponent of its random steps, and the rate at which that turns positive."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.mean_square import gd_critical_lr, rate_of_bounded_moments
from lsp_callbacks.functional.sgd.modes import (
    PLAIN,
    Modes,
    UpdateRule,
    drawn_from,
    in_single_precision,
    in_units,
    noise_share,
)

Sampling = Literal["iid", "reshuffle"]
Coefficients = tuple[Tensor, Tensor, float, Tensor, Tensor]

#: Rates inside the cell in which lambda turns positive.
FINE = 7


@dataclass(frozen=True)
class Exponent:
    """Nats per step with a standard error, of the shape of the rates; the error is 0 where the value is exact."""

    value: Tensor
    error: Tensor


@dataclass(frozen=True)
class CriticalRateResult:
    """The smallest rate at which lambda turns positive.

    Attributes:
        value: inf where none was found.
        error: standard error; 0 where the value is exact.
        mean_square: the rate from which the search went up.
        lrs: rates that were tried, ascending; empty where the value is exact.
        exponents: lambda at them.
    """

    value: float
    error: float
    mean_square: float
    lrs: Tensor
    exponents: Tensor


def gd_exponent(modes: Modes, lr: float | Tensor, *, rule: UpdateRule = PLAIN) -> Tensor:
    """Return ``mu = log max_j rho(step on mode j)`` of full-batch descent, nats per step; exact.

    Source: Chemnitz & Engel 2025, (2.18); with momentum the companion matrix of each mode.
    """
    lr = torch.as_tensor(lr, dtype=torch.float64)
    if not modes.rank:
        return torch.full_like(lr, math.nan)
    delta, phi, beta, b1, b2 = rule.coefficients(lr[..., None])
    h = modes.curvatures + rule.weight_decay
    half, det = (delta + b1 * h + beta) / 2, (delta + b1 * h) * beta - phi * b2 * h
    root = half**2 - det
    radius = torch.where(root >= 0, half.abs() + root.clamp_min(0).sqrt(), det.clamp_min(0).sqrt())
    return radius.amax(-1).log()


def sgd_exponent(
    modes: Modes,
    lr: float | Tensor,
    *,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    sampling: Sampling = "iid",
    replacement: bool = False,
    population: int | None = None,
    chains: int = 8,
    steps: int = 1000,
    burn_in: int = 100,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Exponent:
    """Return ``lambda = lim (1/n) E log ||A_n ... A_1 v||``, the top exponent of SGD at one point; nats per step.

    Args:
        modes: of `reduced_modes`.
        lr: a rate, or several that share the same batches.
        batch_size: at most ``population``.
        rule: of the optimizer.
        sampling: batches independent between steps, or consecutive in random permutations (the last incomplete batch
            dropped). The sign of lambda can differ between the two.
        replacement: within a batch, for ``"iid"``.
        population: number of training samples of which those of ``modes`` are a sub-sample; None: they are all. From a
            sub-sample draws are with replacement, their noise shrunk to the second moment of batches of the population:
            ``H_B <- (1 - f) H + f H_B``, ``f^2 = (population - B) / (population - 1)``, or 1 with ``replacement``.
            Samples that batch statistics tie together are drawn as whole groups, ``H_B = H_G + w (H_S - H_G)``: G
            groups of the M, and B samples S within them, ``w^2 = 1 - (1 - 1 / M) B / (G g)``. Of many groups those are
            true batches (w is 0), of one they are samples (w is 1); the noise of the first kind and of the second add
            up to that of a batch.
        chains: independent runs.
        steps: recorded, after ``burn_in`` that are not.
        burn_in: steps in which the start turns into the leading direction.
        generator: None draws from a fixed seed.
        start: ``(r,)`` or ``(chains, r)``; None starts in the fast modes.

    Returns:
        The largest over components; -inf where a step annihilates the vector, NaN at rank 0. ``error`` is the standard
        deviation over chains divided by ``sqrt(chains)``.

    Raises:
        ValueError: if the batches cannot be drawn.

    Cost: ``O(chains B outputs r)`` a step and rate. Source: Chemnitz & Engel 2025, (2.19); docs/theory.md, section The
    exponent of SGD, frozen at the weights.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import reduced_modes, sgd_exponent
        >>> modes = reduced_modes(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
        >>> round(float(sgd_exponent(modes, 1.0, batch_size=1).value), 2)  # log(0.8) / 2
        -0.11
    """
    lrs = torch.as_tensor(lr, dtype=torch.float64)
    draw = Draw(modes, batch_size, sampling, replacement, population, generator)
    if not draw.noise or not modes.rank:
        exact = gd_exponent(modes, lrs, rule=rule)
        return Exponent(exact, torch.zeros_like(exact))
    if start is None:
        # Slow modes neither grow nor shrink and would hide a small growing one for hundreds of steps.
        signs = torch.randint(0, 2, (chains, modes.rank), generator=draw.generator) * 2.0 - 1
        start = signs * modes.curvatures
    labels = modes.owner.unique()
    groups = modes.owner == labels[:, None]
    start = start.expand(chains, -1)
    step = rule.scaled_coefficients(lrs.reshape(-1, 1).to(modes.factor))
    means = growths(modes, step, start, groups, rule.weight_decay, draw, burn_in + steps)[burn_in:].mean(0)
    value, top = means.mean(0).max(-1)
    spread = means.std(0) if chains > 1 else torch.full_like(means[0], math.nan)
    error = spread.gather(-1, top[:, None])[:, 0] / chains**0.5
    # A chain that died proves a singular step; -inf has no spread.
    error = error.masked_fill(value == -math.inf, 0.0)
    return Exponent(value.reshape(lrs.shape), error.reshape(lrs.shape))


def critical_lr(
    modes: Modes,
    *,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    sampling: Sampling = "iid",
    replacement: bool = False,
    population: int | None = None,
    chains: int = 8,
    steps: int = 300,
    burn_in: int = 50,
    start: float | None = None,
    grid: float = 1.1,
    tol: float = 1e-8,
    generator: torch.Generator | None = None,
) -> CriticalRateResult:
    """Return the smallest rate at which lambda turns positive, by which the stochastic Courant number divides.

    That number is ``lr / critical_lr``. Scans upward on a geometric grid, because the stable set need not be an
    interval, up to the first rate whose exponent exceeds its standard error, and interpolates back to zero. An unstable
    interval narrower than ``grid`` can be missed.

    Args:
        start: where lambda is known to be negative, below every crossing; None computes `mean_square_lr`.
        grid: ratio of neighbouring rates.
        tol: of the mean-square rate.
        modes, batch_size, rule, sampling, replacement, population: see `sgd_exponent`.
        chains, steps, burn_in, generator: see `sgd_exponent`.

    Returns:
        inf if lambda stays negative up to ``1000 start``, or at rank 0.

    Raises:
        ValueError: if the batches cannot be drawn, or ``grid`` is not larger than 1.

    Cost: one `mean_square_lr`, a dozen rates of `sgd_exponent` at once, one to three times, and seven more.
    Source: docs/theory.md, section The exponent of SGD, frozen at the weights.
    """
    if not grid > 1:
        raise ValueError(f"grid={grid} must be larger than 1, the ratio of neighbouring rates")
    none = torch.empty(0, dtype=torch.float64)
    modes, rule, unit = in_units(modes, rule)  # in which single precision suffices
    how: dict[str, Any] = {"batch_size": batch_size, "rule": rule, "replacement": replacement, "population": population}
    single = in_single_precision(modes)
    share = noise_share(drawn_from(len(modes.factor), batch_size, population), batch_size, replacement)
    edge = rate_of_bounded_moments(single if tol > 1e-6 else modes, batch_size, share, rule, tol)
    if math.isinf(edge):
        return CriticalRateResult(edge, 0.0, edge, none, none)
    if batch_size == (population or modes.samples) and not replacement:
        exact = gd_critical_lr(modes, rule)
        return CriticalRateResult(exact / unit, 0.0, edge / unit, none, none)
    lowest = low = start * unit if start else edge
    rates = exponents = errors = none
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    seed = draws.get_state()

    def look(block: Tensor) -> None:
        nonlocal rates, exponents, errors
        draws.set_state(seed)  # the same batches for every rate: the curve is smooth in the rate
        result = sgd_exponent(
            single, block, sampling=sampling, chains=chains, steps=steps, burn_in=burn_in, generator=draws, **how
        )
        rates, order = torch.cat([rates, block]).sort()
        exponents = torch.cat([exponents, result.value])[order]
        errors = torch.cat([errors, result.error])[order]

    def first() -> int | None:
        unstable = torch.nonzero(exponents > errors)[:, 0]
        return int(unstable[0]) if len(unstable) else None

    while low <= 1000 * lowest:
        look(low * grid ** torch.arange(12, dtype=torch.float64))
        above = first()
        if above is not None:
            if above:
                # Below its zero lambda is flat, at the rate of the slowest mode, and only then rises: a straight line
                # across a whole cell would lie too low. Look at the inside of the cell.
                inside = torch.linspace(0, 1, FINE + 2, dtype=torch.float64)[1:-1]
                look(rates[above - 1] * (rates[above] / rates[above - 1]) ** inside)
                above = first() or above
            value, error = _zero(rates, exponents, errors, above)
            return CriticalRateResult(value / unit, error / unit, edge / unit, rates / unit, exponents)
        low = float(rates[-1]) * grid
    return CriticalRateResult(math.inf, 0.0, edge / unit, rates / unit, exponents)


class Draw:
    """A way to draw batches from ``n`` samples; ``noise`` is ``f``: 0 where every batch is all of them."""

    def __init__(
        self, modes: Modes, batch_size: int, sampling: Sampling, replacement: bool, population: int | None, generator
    ):
        n = modes.samples
        if modes.chance is not None:
            raise ValueError("batches cannot be drawn from samples of which only some were looked at")
        total = drawn_from(n, batch_size, population)
        if sampling not in ("iid", "reshuffle"):
            raise ValueError(f"sampling={sampling!r} must be 'iid' or 'reshuffle'")
        if sampling == "reshuffle" and (total > n or replacement):
            raise ValueError("reshuffled batches need every training sample, without replacement: use sampling='iid'")
        if sampling == "reshuffle" and modes.together > 1:
            raise ValueError("the batches of a permutation have batch statistics that are not known: use 'iid'")
        self.n, self.batch_size, self.sampling, self.together = n, batch_size, sampling, modes.together
        self.whole, self.share = modes.shares(batch_size)
        self.replacement = replacement or total > n or modes.together > 1
        self.noise = (
            1.0
            if replacement or (batch_size < total and not self.replacement)
            else math.sqrt((total - batch_size) / max(total - 1, 1))
        )
        self.generator = generator or torch.Generator().manual_seed(0)

    def indices(self, steps: int, chains: int) -> Tensor:
        """Return samples of the batches of at least ``steps`` steps, ``(steps, chains, B)``."""
        n, size = self.n, self.batch_size
        if self.sampling == "reshuffle":
            epoch = n // size
            shuffled = torch.rand(-(-steps // epoch), chains, n, generator=self.generator).argsort(-1)
            return shuffled[..., : epoch * size].unflatten(-1, (epoch, size)).transpose(1, 2).flatten(0, 1)
        if self.replacement or size == 1:
            return torch.randint(n, (steps, chains, size), generator=self.generator)
        return torch.rand(steps, chains, n, generator=self.generator).argsort(-1)[..., :size]

    def batches(self, steps: int, chains: int, *, counted: bool) -> Iterator[Tensor]:
        """Yield indices ``(chains, B)`` for each step, or how often each sample is drawn, ``(chains, n)``."""
        while steps > 0 and self.together > 1:
            yield from self._tied(min(steps, 256), chains)
            steps -= 256
        while steps > 0:
            index = self.indices(min(steps, 256), chains)
            steps -= len(index)
            if counted:
                counts = torch.zeros(len(index), chains, self.n, dtype=torch.float64)
                yield from counts.scatter_add_(-1, index, torch.ones(1, dtype=torch.float64).expand(index.shape))
            else:
                yield from index

    def _tied(self, steps: int, chains: int) -> Tensor:
        """Return weights of samples in groups drawn as a whole, with further draws within them; their sums are B."""
        g, size = self.together, self.batch_size
        drawn = torch.randint(self.n // g, (steps, chains, self.whole), generator=self.generator)
        within = torch.randint(g, (steps, chains, size), generator=self.generator)
        # As many samples in each group as the others, but for the last ones.
        samples = drawn[..., torch.arange(size) % self.whole] * g + within
        unit = torch.ones(1, dtype=torch.float64)
        groups = torch.zeros(steps, chains, self.n // g, dtype=torch.float64)
        groups.scatter_add_(-1, drawn, unit.expand(drawn.shape)).mul_(size / (g * self.whole))
        weight = self.share**0.5
        whole = groups.repeat_interleave(g, -1) * (1 - weight)
        return whole.scatter_add_(-1, samples, (weight * unit).expand(samples.shape))


def growths(
    modes: Modes, coefficients: Coefficients, start: Tensor, groups: Tensor, decay: float, draw: Draw, steps: int
) -> Tensor:
    """Return log growths of ``sqrt(|v|^2 + lr^2 |m|^2)`` in each step, ``(steps, chains, rates, groups)``.

    ``coefficients`` are the `UpdateRule.scaled_coefficients` of the rates, ``decay`` the coupled weight decay.
    ``groups`` are 0/1 rows over modes that no step mixes: each has a norm of its own, so that one run serves all.
    The dtype is that of the modes.
    """
    factor = modes.factor * math.sqrt(draw.noise / draw.batch_size)
    rows = factor.flatten(0, 1)
    start, groups = start.to(rows), groups.to(rows)
    delta, phi, beta, b1, b2 = coefficients
    count = len(delta)
    # H' v = mean v + u: all that is diagonal, of v+ = delta v + phi lr m + b1 (mean v + u) and
    # lr m+ = beta lr m + lr b2 (mean v + u). The state is v alone, or v and lr m.
    mean = (1 - draw.noise) * modes.curvatures + decay
    keep, feed = delta + b1 * mean, b2 * mean
    zero = torch.zeros_like(keep)
    diagonal, cross = torch.stack([keep, zero + beta])[:, None], torch.stack([zero + phi, feed])[:, None]
    push = torch.stack([b1, b2])[:, None]
    # A step that leaves less than this has left rounding errors only: the vector is dead.
    dead = (8 * torch.finfo(rows.dtype).eps) ** 2
    v = start[:, None].expand(-1, count, -1)
    v = v * (torch.threshold((v * v) @ groups.mT, 0.0, math.inf).rsqrt() @ groups)
    state = torch.stack([v, 0 * v]) if beta else v[None]
    diagonal, push = diagonal[: len(state)], push[: len(state)]
    squares = torch.empty(steps, len(start), count, len(groups), dtype=v.dtype)
    # To gather the rows of a batch is to move memory, once for all rates; to take all rows is to multiply more.
    moved = len(start) * draw.batch_size * factor[0].numel()
    counted = draw.n * count <= draw.batch_size * (count + (10 if moved > 2**18 else 1)) or draw.together > 1
    for square, batch in zip(squares, draw.batches(steps, len(start), counted=counted)):
        if counted:
            outputs = (state[0] @ rows.mT).unflatten(-1, factor.shape[:2]) * batch.to(rows)[:, None, :, None]
            u = outputs.flatten(-2) @ rows
        else:
            drawn = factor.index_select(0, batch.flatten()).view(len(start), -1, rows.shape[1])
            u = torch.bmm(torch.bmm(state[0], drawn.mT), drawn)
        new = (diagonal * state).addcmul_(push, u)
        state = new.addcmul_(cross, state.flip(0)) if beta else new
        if len(groups) == 1:
            torch.sum(state * state, (0, -1), out=square[..., 0])
            state *= torch.threshold(square, dead, math.inf).rsqrt_()
        else:
            torch.matmul((state * state).sum(0), groups.mT, out=square)
            state *= torch.threshold(square, dead, math.inf).rsqrt_() @ groups
    return torch.threshold(squares, dead, 0.0).double().log_() / 2


def _zero(rates: Tensor, exponents: Tensor, errors: Tensor, above: int) -> tuple[float, float]:
    """Return the zero between rate ``above`` and its predecessor, linear in the log of the rate, and its error."""
    while above and exponents[above - 1] >= 0:  # positive, but not beyond its error
        above -= 1
    if not above or exponents[above - 1] == -math.inf:  # nothing to interpolate with
        return float(rates[above]), float(rates[above] - rates[above - 1]) if above else 0.0
    top, below = float(exponents[above]), float(exponents[above - 1])
    width = math.log(float(rates[above] / rates[above - 1]))
    value = float(rates[above]) * math.exp(-width * top / (top - below))
    return value, value * float(errors[above - 1 : above + 1].max()) * width / (top - below)
