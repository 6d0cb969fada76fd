"""Curves as a report needs them: readings, means, the loss alarm."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lsp_callbacks.monitor.history import Curve

#: How many Courant numbers are averaged: each is one mini-batch's, and the exponent is a mean of as many windows.
AVERAGE = 5
#: Steps over which the loss is averaged, and the first steps whose mean is the initial loss.
SMOOTHING, INITIAL = 50, 5


def readings(curve: Curve | None) -> list[float]:
    """All values but NaN: an infinite number is a reading."""
    return [] if curve is None else [value for value in curve.values if not math.isnan(value)]


def latest(curve: Curve | None) -> float:
    """The last reading, NaN if there is none."""
    return next(reversed(readings(curve)), math.nan)


def averaged(curve: Curve, of: int = AVERAGE) -> Curve:
    """Each reading with up to ``of - 1`` before it; NaN stays where it is."""
    means: list[float] = []
    seen: list[float] = []
    for value in curve.values:
        seen = seen if math.isnan(value) else [*seen, value][-of:]
        means.append(value if math.isnan(value) else sum(seen) / len(seen))
    return Curve(list(curve.steps), means)


def loss_alarm(values: Sequence[float], *, stride: int = 1) -> int | None:
    """Where a loss alarm would have gone off, to compare with.

    The mean over the last 50 steps (over all, before there are so many) is above twice its own least value so far
    *and* above a quarter of the initial loss, the mean of the first 5; or a loss is not finite. Without the second
    condition, noise sets it off once a small data set is memorised. Twice the best means nothing for losses that can be
    negative: of these, only the ones that are not finite count.

    Args:
        values: one a step, or means of several.
        stride: how many.

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
    """The mean of each value and up to ``window - 1`` before it."""
    padded = np.concatenate([np.zeros(window - 1), values])
    # Sums of windows, not differences of running sums: a loss of 1e20 would swallow all that come after it.
    sums = np.lib.stride_tricks.sliding_window_view(padded, window).sum(-1)
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def centred_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median around each value, over fewer where an end is near: it lags behind no change and smears none out."""
    around = [min(i, len(values) - 1 - i, window // 2) for i in range(len(values))]
    return np.array([np.median(values[i - n : i + n + 1]) for i, n in enumerate(around)])


def load(module: str) -> Any:
    """A module of matplotlib or rich, which are not needed until something is shown."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"a report needs {module.split('.')[0]}, which is not installed: pip install 'lsp-callbacks[report]'"
        ) from error


def check_installed() -> None:
    """Says early that something is missing.

    Raises:
        ImportError: without matplotlib or rich.
    """
    for module in ("matplotlib", "rich"):
        load(module)
