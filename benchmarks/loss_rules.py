"""Rules that others stop training by, on the losses, gradient norms and rates of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def early_stopping(losses: Sequence[float], times: float) -> int | None:
    """Lightning's ``EarlyStopping(check_finite=True, divergence_threshold=times * first loss)`` on training losses."""
    return next((k for k, loss in enumerate(losses) if not loss <= times * losses[0]), None)


def spike_detection(losses: Sequence[float], rtol: float) -> int | None:
    """Lightning's ``SpikeDetection(window=10, warmup=1, rtol=rtol)``: a loss above 1 + rtol times its mean.

    Its window keeps out no loss: after a spike it raises, and training ends.
    """
    for k in range(1, len(losses)):
        mean = float(np.mean(losses[max(0, k - 10) : k]))
        if not math.isfinite(losses[k]) or (losses[k] > losses[k - 1] and losses[k] - mean >= rtol * abs(mean)):
            return k
    return None


def z_score(losses: Sequence[float], limit: float, window: int = 100, least: int = 30) -> int | None:
    """A loss that is so many standard deviations above the mean of the last hundred."""
    for k in range(len(losses)):
        before = losses[max(0, k - window) : k]
        if not math.isfinite(losses[k]):
            return k
        if len(before) >= least and losses[k] > np.mean(before) + limit * np.std(before):
            return k
    return None


def gradient_spike(norms: Sequence[float], times: float, window: int = 100, least: int = 30) -> int | None:
    """A gradient so many times longer than the median of the last hundred."""
    for k, norm in enumerate(norms):
        before = norms[max(0, k - window) : k]
        if not math.isfinite(norm) or (len(before) >= least and norm > times * np.median(before)):
            return k
    return None


def mean_above(steps: Sequence[int], values: Sequence[float], limit: float, of: int = 3) -> int | None:
    """The mean of some readings above a limit, as in `StopOnInstability`; NaN neither counts nor resets."""
    known = [(step, value) for step, value in zip(steps, values) if not math.isnan(value)]
    for k in range(of - 1, len(known)):
        if sum(value for _, value in known[k - of + 1 : k + 1]) / of > limit:
            return known[k][0]
    return None
