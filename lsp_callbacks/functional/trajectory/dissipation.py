"""The rate at which an energy falls along a run, estimated from the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.statistics import student_quantile

#: Runs of consecutive steps that the jackknife leaves out in turn, and the steps that each must have.
BLOCKS, LEAST = 10, 5
#: Of the variance, without which the rest of the series is nothing but rounding.
ALONE = 1e-6
#: Of Kendall's bias: noise whose size changes with the energy has a larger one.
MULTIPLE = 4.0
#: Of the square of its t-statistic, below which an instrument is too weak (Staiger & Stock 1997).
STRONG = 10.0
_NAN = torch.full((), torch.nan, dtype=torch.float64)


@dataclass(frozen=True)
class DissipationResult:
    """The fit of ``E_{t+1} = q E_t + c + noise``.

    Attributes:
        gamma: ``1 - q``, corrected for its bias; the excess over the floor falls by this share in a step.
        lower: one-sided 90 % bound, and
        upper: the other one; NaN where the series is too short, or the instrument too weak.
        floor: ``c / (1 - q)``, where the energy comes to rest; NaN where q is not below 1.
        floor_error: its standard error; NaN where the series is too short.
        increases: share of the steps in which the energy rose.
        slope: q by plain least squares, uncorrected.
    """

    gamma: Tensor
    lower: Tensor
    upper: Tensor
    floor: Tensor
    floor_error: Tensor
    increases: Tensor
    slope: Tensor


def dissipation(energy: Tensor, *, confidence: float = 0.9) -> DissipationResult:
    """Return the rate at which an energy dissipates, and the floor that noise holds it at, by least squares.

    ``E_{t+1} = q E_t + c`` is fitted over all pairs of consecutive steps, ``gamma = 1 - q``. (The slope of ``log E``
    over t would be badly wrong as soon as there is a floor.) The slope is biased down: on ``theta+ = 0.8 theta + xi``,
    ``E = theta^2``, 200 steps give 0.59 in the mean where q = 0.64. Kendall's ``q + (1 + 3 q) / n``, made for normal
    noise of one size, gives 0.61. Here ten runs of consecutive pairs are left out in turn, and the jackknife takes the
    bias off: 0.62; it never moves the slope by more than four times what Kendall's would.

    The bounds are the outer ones of two intervals, as either may fail where the other holds. The first, from the same
    jackknife, allows for noise of changing size, and about correlated noise as long as q is read as the best
    prediction of the next energy from this one. The second takes ``E_{t-1}`` as the instrument of ``E_t``:
    ``cov(E_{t+1}, E_{t-1}) / cov(E_t, E_{t-1})``, with the jackknife too; it holds where each energy is read with an
    error of its own, as the loss of a mini-batch is. Such errors draw the slope to 0 and gamma to 1, and only the
    bounds say so. On a plateau, where nothing but such errors is left, the instrument is weak, and there are no bounds.
    Coverage in ``benchmarks/dissipation_is_covered.py``: 87 to 100 % on each side, of a promised 90 %.

    Args:
        energy: ``(n,)`` of consecutive steps, oldest first, three at least.
        confidence: of each bound by itself.

    Raises:
        Unmeasurable: fewer than three steps, numbers that are not finite, or an energy that does not change.

    Source: Katende 2025, Thm 3.1 and Assumption 4; Kendall 1954 and Kuensch 1989 for the bias; Staiger & Stock 1997.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import dissipation
        >>> result = dissipation(2 + 0.75 ** torch.arange(60.0, dtype=torch.float64))
        >>> round(float(result.gamma), 6), round(float(result.floor), 6), float(result.increases)
        (0.25, 2.0, 0.0)
    """
    energy = energy.double()
    if len(energy) < 3:
        raise Unmeasurable(f"{len(energy)} steps are too few to fit the decay of an energy: give three at least")
    if not bool(energy.isfinite().all()):
        raise Unmeasurable("the energy is not finite at every step: give finite values only")
    before, after = energy[:-1], energy[1:]
    # In units of its own spread, so that no square overflows or drowns.
    centre, spread = energy.mean(), before.std()
    if not bool(spread > 1e-12 * energy.abs().max()):
        raise Unmeasurable("the energy does not change, so that any rate fits it: give steps in which it changes")
    x, y = (before - centre) / spread, (after - centre) / spread
    lower = upper = floor_error = _NAN
    q, rest = _line(_sums(x, y, x)[:, 0])
    slope = q
    if len(x) - 1 >= BLOCKS * LEAST:
        q, rest, floor_error, (lower, upper) = _jackknife(x, y, confidence)
    stable = bool(q < 1)
    return DissipationResult(
        gamma=1 - q,
        lower=lower,
        upper=upper,
        floor=centre + spread * rest if stable else _NAN,
        floor_error=spread * floor_error if stable else _NAN,
        increases=(after > before).double().mean(),
        slope=slope,
    )


def _sums(x: Tensor, y: Tensor, z: Tensor, blocks: int = 1) -> Tensor:
    """Return the sums, ``(6, blocks)``, of a fit of y on x with instrument z; those of parts add up."""
    terms = torch.stack([torch.ones_like(x), x, y, z, z * x, z * y])
    block = torch.arange(len(x)) * blocks // len(x)
    return terms.new_zeros(6, blocks).index_add_(1, block, terms)


def _covariances(sums: Tensor) -> Tensor:
    """Return the covariances of z with y and with x."""
    n, x, y, z, zx, zy = sums
    return torch.stack([zy / n - z * y / n**2, zx / n - z * x / n**2])


def _line(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope, and where the line crosses the diagonal."""
    top, below = _covariances(sums)
    n, x, y = sums[:3]
    q = top / below
    return q, (y - q * x) / n / (1 - q)


def _jackknife(x: Tensor, y: Tensor, confidence: float) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return corrected slope, crossing, its error, and bounds on gamma."""
    t, scale = student_quantile(confidence, BLOCKS - 1), (BLOCKS - 1) / BLOCKS
    parts = _sums(x, y, x, BLOCKS)
    whole = parts.sum(1)
    q, plain = _line(whole)
    left = whole[:, None] - parts
    if not bool((_covariances(left)[1] > ALONE * _covariances(whole)[1]).all()):
        return q, plain, _NAN, (_NAN, _NAN)
    others, crossings = _line(left)
    # No bias is larger than some multiple of Kendall's: what exceeds it is the chance of a few large pairs.
    most = MULTIPLE * (1 + 3 * q.abs()) / len(x)
    corrected = q + ((BLOCKS - 1) * (q - others.mean())).clamp(-most, most)
    half = t * (scale * (others - others.mean()).square().sum()).sqrt()
    n, sx, sy = whole[:3]
    crossing = (sy - corrected * sx) / n / (1 - corrected)
    error = (scale * (crossings - crossings.mean()).square().sum()).sqrt()

    parts = _sums(x[1:], y[1:], x[:-1], BLOCKS)
    share = torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1].square()
    if not bool(share * len(x) > STRONG * (1 - share)):
        return corrected, crossing, error, (_NAN, _NAN)
    whole = parts.sum(1)
    q, _ = _line(whole)
    others, _ = _line(whole[:, None] - parts)
    second = BLOCKS * q - (BLOCKS - 1) * others.mean()
    wide = t * (scale * (others - others.mean()).square().sum()).sqrt()
    bounds = 1 - torch.maximum(corrected + half, second + wide), 1 - torch.minimum(corrected - half, second - wide)
    return corrected, crossing, error, bounds
