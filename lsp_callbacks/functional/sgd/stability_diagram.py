"""Where lambda changes sign: the critical rate of a batch size, and the diagram over both."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.mean_square import gd_critical_lr, mean_square_lr
from lsp_callbacks.functional.sgd.modes import PLAIN, Modes, UpdateRule, in_units
from lsp_callbacks.functional.sgd.sgd_stability import Sampling, sgd_exponent

#: Rates inside the cell in which lambda turns positive.
FINE = 7


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


@dataclass(frozen=True)
class StabilityDiagram:
    """Exponents over batch sizes (rows) and rates (columns), and the edges of each batch size.

    Attributes:
        lrs: ``(L,)``, ascending.
        batch_sizes: ``(S,)``.
        lyapunov: ``(S, L)``, nats per step.
        error: ``(S, L)``, its standard error.
        critical_lr: ``(S,)``, the smallest rate at which lambda turns positive.
        critical_error: ``(S,)``, its standard error.
        mean_square_lr: ``(S,)``, of i.i.d. batches.
    """

    lrs: Tensor
    batch_sizes: Tensor
    lyapunov: Tensor
    error: Tensor
    critical_lr: Tensor
    critical_error: Tensor
    mean_square_lr: Tensor


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
    single = _single(modes)
    edge = mean_square_lr(single if tol > 1e-6 else modes, tol=tol, **how)
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


def stability_diagram(
    modes: Modes,
    *,
    lrs: Tensor | None = None,
    batch_sizes: list[int] | None = None,
    rule: UpdateRule = PLAIN,
    sampling: Sampling = "iid",
    replacement: bool = False,
    population: int | None = None,
    chains: int = 8,
    steps: int = 300,
    burn_in: int = 50,
    generator: torch.Generator | None = None,
) -> StabilityDiagram:
    """Return exponents over (rate, batch size), with the critical and the mean-square rate of each batch size.

    Args:
        lrs: None takes 24 in a geometric row, from half of the lowest edge to twice the highest.
        batch_sizes: None takes the powers of two up to the population, at most four times the samples, and the
            population itself where it is that small.
        modes, rule, sampling, replacement, population, chains, steps, burn_in, generator: see `sgd_exponent`.

    Raises:
        ValueError: if the network is collapsed (rank 0) and ``lrs`` is None, or if the batches cannot be drawn.

    Cost: for each batch size one `critical_lr` and one `sgd_exponent` over all rates.
    """
    total = population or modes.samples
    if batch_sizes is None:
        most = min(total, 4 * modes.samples)
        batch_sizes = sorted(
            {2**k for k in range(most.bit_length()) if 2**k <= most} | ({total} if total == most else set())
        )
    draw: dict[str, Any] = {"rule": rule, "sampling": sampling, "replacement": replacement, "population": population}
    draw |= {"chains": chains, "steps": steps, "burn_in": burn_in, "generator": generator}
    edges = [critical_lr(modes, batch_size=size, **draw) for size in batch_sizes]
    critical, errors, mean_square = torch.tensor(
        [(e.value, e.error, e.mean_square) for e in edges], dtype=torch.float64
    ).T
    if lrs is None:
        finite = torch.cat([critical, mean_square])
        finite = finite[finite.isfinite()]
        if not len(finite):
            raise ValueError("no finite edge to choose rates from (a collapsed network?): pass lrs")
        lrs = torch.logspace(
            float((finite.min() / 2).log10()), float((finite.max() * 2).log10()), 24, dtype=torch.float64
        )
    scaled, draw["rule"], unit = in_units(modes, rule)
    single = _single(scaled)
    rows = [sgd_exponent(single, lrs * unit, batch_size=size, **draw) for size in batch_sizes]
    return StabilityDiagram(
        lrs=lrs,
        batch_sizes=torch.tensor(batch_sizes),
        lyapunov=torch.stack([row.value for row in rows]),
        error=torch.stack([row.error for row in rows]),
        critical_lr=critical,
        critical_error=errors,
        mean_square_lr=mean_square,
    )


def _single(modes: Modes) -> Modes:
    """Return the modes in float32, twice as fast and with a rounding far below the noise of the chains."""
    return replace(modes, factor=modes.factor.float(), curvatures=modes.curvatures.float())


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
