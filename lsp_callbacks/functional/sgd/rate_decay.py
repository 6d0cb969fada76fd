"""How fast the learning rates have faded, from partial sums over octaves of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

#: Steps below which no exponent is estimated.
ENOUGH = 64
#: The estimate of a geometric decay at T/2 is below this while that at T is a power; with a margin.
GEOMETRIC = 0.52


@dataclass(frozen=True)
class RateDecay:
    """The decay of the rates over the last octaves of steps.

    Attributes:
        exponent: p where they fell like ``t^-p`` over the last two octaves; NaN where they ended, or too few were
            recorded.
        before: p of the two octaves that end half-way.
        holds: whether both are in (1/2, 1]; None where too few steps were recorded.
    """

    exponent: float
    before: float
    holds: bool | None


def rate_decay(sums: Mapping[int, float], *, gap: int = 1) -> RateDecay:
    """Return how fast the rates have faded, from partial sums, for schedules whose form is unknown.

    It describes the steps so far: no finite number of steps decides whether an infinite sum converges. By Cauchy's
    condensation the sum of falling rates grows without bound as their sums over octaves of steps do. For ``lr = t^-p``

        ``S(T/2, T) / S(T/4, T/2) = 2^(1 - p)``,  so  ``p = 1 - log2`` of that ratio:

    ``p <= 1`` where octaves do not shrink and the rates' sum is infinite, ``p > 1/2`` where those of the squares do.
    Steps before T/8, and so a warm-up, do not enter. For ``(1 + t / start)^-p`` the estimate approaches p from below
    as T exceeds ``start``.

    It ``holds`` where p lies in (1/2, 1] at T and in (0.52, 1] at T/2, since the estimate of other decays passes
    through (1/2, 1]: that of a geometric decay over tau steps does so between T = 0.94 tau and 1.93 tau, when its
    estimate at T/2 is at most 0.51. Powers between 1/2 and 0.52 are therefore rejected. The estimate of a rate that is
    halved every n steps is 0 until T = n, then rises unevenly (it may hold for a moment near T = 3 n), and then is ``1
    + T / (4 n)``.

    Whether steps are counted from 0 or 1, and whether a rate stands for the time before or after it, moves t by half a
    step, and p by ``(gap / 2) |d log2(ratio) / dT|``, which is ``0.51 gap / T`` at p = 1/2 and
    ``1.04 gap / T`` at 1. Twice that is the tolerance, ``2 p gap / T``, so that p = 1 passes, and 1/2 does not.

    Args:
        sums: at rising steps, those of the rates since the one before. T is the last, and T/2, T/4 and T/8 are there.
        gap: the largest number of steps between two whose rates were recorded.

    Returns:
        `RateDecay`; of fewer than 64 steps NaN and None.

    Source: Cauchy 1821; Knopp 1951, section 16; Katende 2025, Thm 5.3; docs/theory.md, section The law of SGD,
    energies, kinks.

    Example:
        >>> from lsp_callbacks.functional import rate_decay
        >>> result = rate_decay({t + 1: (1 + t) ** -0.75 for t in range(1024)})
        >>> round(result.exponent, 2), result.holds
        (0.75, True)
    """
    T = max(sums, default=0)
    now, before = _power(sums, T), _power(sums, T // 2)
    if now is None or before is None or T < ENOUGH:
        return RateDecay(math.nan, math.nan, None)
    readings = ((now, T, 0.5), (before, T // 2, GEOMETRIC))
    holds = all(least + gap / end < p <= 1 + 2 * gap / end for p, end, least in readings)
    now, before = (p if math.isfinite(p) else math.nan for p in (now, before))
    return RateDecay(now, before, holds)


def _power(sums: Mapping[int, float], T: int) -> float | None:
    """Return the exponent of the octaves before T; infinity where the rates ended, None where some are missing."""
    if T % 4 or not {T, T // 2, T // 4} <= sums.keys():
        return None
    late, early = (sum(part for t, part in sums.items() if end // 2 < t <= end) for end in (T, T // 2))
    if not late > 0:
        return math.inf
    return 1.0 - math.log2(late / early) if early > 0 else -math.inf
