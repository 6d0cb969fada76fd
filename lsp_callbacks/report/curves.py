"""Curves of a report: readings, means, the loss alarm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.plots.figure import load

#: Number of Courant numbers that are averaged: each is one mini-batch's, and the exponent is a mean of as many windows.
AVERAGE = 5
#: Number of steps over which the loss is averaged, and of the first steps whose mean is the initial loss.
SMOOTHING, INITIAL = 50, 5
#: A curve of more points is smoothed over more of them, so that about so many means are left.
MEANS = 100


def readings(curve: Curve | None) -> list[float]:
    """Return all values but NaN: an infinite number is a reading."""
    return [] if curve is None else [value for value in curve.values if not math.isnan(value)]


def latest(curve: Curve | None) -> float:
    """Return the last reading, NaN if there is none."""
    return next(reversed(readings(curve)), math.nan)


def smoothing_window(count: int, least: int) -> int:
    """Return over how many points a curve is smoothed: more of a long one, whose noise would hide it.

    Example:
        >>> smoothing_window(300, 5), smoothing_window(4_000, 5)
        (5, 40)
    """
    return max(least, count // MEANS)


def averaged(curve: Curve, of: int = AVERAGE) -> Curve:
    """Return the mean of each reading and up to ``of - 1`` before it; NaN stays where it is."""
    means: list[float] = []
    seen: list[float] = []
    for value in curve.values:
        seen = seen if math.isnan(value) else [*seen, value][-of:]
        means.append(value if math.isnan(value) else sum(seen) / len(seen))
    return Curve(list(curve.steps), means)


def loss_alarm(values: Sequence[float], *, stride: int = 1) -> int | None:
    """Return where a loss alarm would have gone off, for comparison.

    The mean over the last 50 steps (over all, before there are so many) is above twice its own least value so far
    *and* above a quarter of the initial loss, the mean of the first 5; or a loss is not finite. Without the second
    condition, noise triggers it once a small data set is memorised. Twice the least value means nothing for losses that
    can be negative: of these, only the ones that are not finite count.

    Args:
        values: losses of the steps, or means over several steps.
        stride: number of steps in a mean.

    Returns:
        The index of the value, or None.

    Example:
        >>> loss_alarm([2.0] * 50 + [1.0] * 50 + [5.0] * 50)  # after n of the last ones: 1 + 4 n / 50 > 2
        112
        >>> loss_alarm([2.0] * 100)
    """
    losses = np.asarray(values, dtype=float)
    broken = np.flatnonzero(~np.isfinite(losses))
    end = int(broken[0]) if len(broken) else len(losses)
    if end >= INITIAL and losses[:end].min() >= 0:
        means = trailing_mean(losses[:end], max(1, SMOOTHING // stride))
        means[: INITIAL - 1] = means[INITIAL - 1]
        above = np.flatnonzero(means > np.maximum(2 * np.minimum.accumulate(means), 0.25 * means[0]))
        if len(above):
            return int(above[0])
    return end if len(broken) else None


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and up to ``window - 1`` before it."""
    padded = np.concatenate([np.zeros(window - 1), values])
    # Sums of windows, not differences of running sums, where a loss of 1e20 would remove all later ones by rounding.
    sums = np.lib.stride_tricks.sliding_window_view(padded, window).sum(-1)
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def centred_median(values: np.ndarray, window: int) -> np.ndarray:
    """Return the median around each value, over fewer values near the ends, so that no change is delayed."""
    around = [min(i, len(values) - 1 - i, window // 2) for i in range(len(values))]
    return np.array([np.median(values[i - n : i + n + 1]) for i, n in enumerate(around)])


def check_installed() -> None:
    """Check early that everything for a report is installed.

    Raises:
        ImportError: without matplotlib or rich.
    """
    for module in ("matplotlib", "rich"):
        load(module)
