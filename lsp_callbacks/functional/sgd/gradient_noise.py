"""The noise of mini-batch gradients, from the Gram matrix of per-sample ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.statistics import fieller, student_quantile


@dataclass(frozen=True)
class GradientNoise:
    """Statistics of the gradients ``g_i`` of single samples.

    Attributes:
        variance: ``tr Sigma = E ||g_i - G||^2``, unbiased.
        variance_error: its standard error.
        signal: ``||G||^2`` of the mean over all training samples, unbiased; it may be negative.
        scale: ``tr Sigma / ||G||^2`` in samples, of the two unbiased estimates; NaN where the signal is not positive.
        lower: one-sided 90 % bound of the scale, and
        upper: the other one; NaN where the gradient is not significant beside its noise.
    """

    variance: Tensor
    variance_error: Tensor
    signal: Tensor
    scale: Tensor
    lower: Tensor
    upper: Tensor


def gradient_noise(gram: Tensor, *, population: int | None = None, confidence: float = 0.9) -> GradientNoise:
    """Return variance, signal and noise scale of gradients from ``Q_ij = <g_i, g_j>`` of n samples.

    ``tr Sigma = (sum_i Q_ii - sum_ij Q_ij / n) / (n - 1)``; the mean of ``Q_ij`` over pairs of different samples is an
    unbiased ``||G||^2``, where n samples of a finite population N need ``(1 - 1 / N)`` of it and ``1 / N`` of the mean
    of ``Q_ii``. Errors by the jackknife over the samples, the ratio's bounds by Fieller's theorem. The noise scale
    is about the batch size at which noise and signal are alike: batches much below it waste steps, batches much above
    it waste samples. It grows along training.

    Args:
        gram: ``(n, n)``, symmetric, of at least two samples drawn without replacement.
        population: how many training samples there are; None is a stream without end.
        confidence: of each bound by itself.

    Raises:
        Unmeasurable: for one sample, or gradients that are not finite.

    Source: McCandlish et al. 2018, (2.8) and appendix A.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import gradient_noise
        >>> g = torch.tensor([[1.0], [3.0]])  # all there are: G = 2, variance 2
        >>> result = gradient_noise(g @ g.T, population=2)
        >>> [round(float(number), 6) for number in (result.variance, result.signal, result.scale)]
        [2.0, 4.0, 0.5]
    """
    n = len(gram)
    if n < 2:
        raise Unmeasurable(f"{n} sample is too few to estimate the noise of gradients: give two at least")
    if not bool(gram.isfinite().all()):
        raise Unmeasurable("the gradients of the samples are not finite: their noise is not defined")
    size = gram.double().abs().max()
    q = gram.double() / torch.where(size > 0, size, 1.0)  # the squares of what follows are numbers then
    squares, rows, total = q.diagonal(), q.sum(1), q.sum()
    variance, signal = _unbiased(torch.tensor(float(n)).double(), squares.sum(), total, population)
    nan = torch.full_like(variance, torch.nan)
    if n < 3:  # nothing can be left out
        error = torch.zeros_like(variance) if n == population else nan
        scale = torch.where(signal > 0, variance / signal, nan)
        variance, signal, error = size * variance, size * signal, size * error
        return GradientNoise(variance, error, signal, scale, *((scale, scale) if n == population else (nan, nan)))
    left = torch.stack(
        _unbiased(torch.tensor(n - 1.0).double(), squares.sum() - squares, total - 2 * rows + squares, population)
    )
    moves = left - left.mean(1, keepdim=True)
    # Of a finite population less is unknown.
    covariance = (n - 1) / n * moves @ moves.T * (1 - n / population if population else 1.0)
    lower, upper = fieller(variance, signal, covariance, student_quantile(confidence, n - 1))
    positive = signal > 0
    return GradientNoise(
        variance=size * variance,
        variance_error=size * covariance[0, 0].sqrt(),
        signal=size * signal,
        scale=torch.where(positive, variance / signal, nan),
        lower=torch.where(positive, lower, nan),
        upper=torch.where(positive, upper, nan),
    )


def _unbiased(n: Tensor, squares: Tensor, total: Tensor, population: int | None) -> tuple[Tensor, Tensor]:
    variance = (squares - total / n) / (n - 1)
    pairs = (total - squares) / (n * (n - 1))
    share = 1 / population if population else 0.0
    return variance, (1 - share) * pairs + share * squares / n


def batch_variance(variance: float, batch_size: int, population: int | None = None) -> float:
    """Return ``E ||g_B - G||^2 = tr Sigma (1 / B - 1 / N)`` of batches drawn without replacement.

    Args:
        variance: ``tr Sigma`` of one sample.
        batch_size: B.
        population: N; None is a stream without end.

    Example:
        >>> from lsp_callbacks.functional import batch_variance
        >>> batch_variance(8.0, 4), batch_variance(8.0, 4, population=8), batch_variance(8.0, 8, population=8)
        (2.0, 1.0, 0.0)
    """
    return max(0.0, variance * (1 / batch_size - (1 / population if population else 0.0)))
