"""The batch size beyond which a larger batch bears little more: where half of the full batch's rate is stable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class UsefulBatch:
    """A batch size, with the interval in which it lies.

    Attributes:
        size: the smallest whose largest stable rate is at least half that of the full batch.
        low: lower end.
        high: upper end; inf where so few samples set none.
    """

    size: float
    low: float
    high: float


def useful_batch(critical_lr: Callable[[int], float], *, population: int, samples: int) -> UsefulBatch:
    """Return the batch size at which noise and mean curvature limit the learning rate alike.

    The largest stable rate of batches of B behaves as ``1 / eta(B) = a / B + b``, with the noise a of single samples
    and the mean curvature b: in proportion to B while ``B << a / b``, and constant from there on. Returned is the B
    at which ``eta(B)`` is half of ``eta(population)``, which is ``a / b`` of that law, without assuming the law.

    N samples have noise of their own: they are a batch, too, and their largest curvature is ``b + k a / N``, with k
    between 0 (all the same direction) and 1 (orthogonal ones). So what they say, ``B_N``, is too small, and at most
    ``1 / (1 / B_N - 1 / N)``; the size is that of the middle, k = 1/2. The interval is wider by five standard errors
    of a mean over N numbers that scatter by their own size, ``5 / sqrt(N)``.

    Args:
        critical_lr: the largest stable rate of a batch size; it must not fall with it.
        population: the largest batch, all training samples.
        samples: how many ``critical_lr`` was found from, N.

    Raises:
        ValueError: if no rate is unstable.

    Cost: ``log2(population)`` critical rates. Source: docs/theory.md, section The exponent of SGD, frozen at the
    weights.

    Example:
        >>> from lsp_callbacks.functional import useful_batch
        >>> batch = useful_batch(lambda size: 1 / (30 / size + 1), population=10**6, samples=10**6)
        >>> round(batch.low), round(batch.size), round(batch.high)
        (30, 30, 30)
    """
    if not 1 <= samples <= population:
        raise ValueError(f"samples={samples} must lie in 1 ... {population}, the number of training samples")
    whole = critical_lr(population)
    if not 0 < whole < math.inf:
        raise ValueError(f"the largest stable rate of the full batch is {whole}: nothing limits batches here")
    below, low = 0, population
    while low - below > 1:
        middle = (low + below) // 2
        if critical_lr(middle) >= whole / 2:
            low = middle
        else:
            below = middle

    def without(share: float) -> float:
        rest = 1 / low - share / samples
        return 1 / rest if rest > 0 else math.inf

    if samples == population:  # nothing was left out
        return UsefulBatch(low, low, low)
    wider = 1 + 5 / samples**0.5
    size, high = without(0.5), without(1.0) * wider
    return UsefulBatch(min(size, population), low / wider, min(high, population) if high < math.inf else high)
