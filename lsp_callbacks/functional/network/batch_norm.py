"""How far the statistics of a batch are from those that BatchNorm will use in eval mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Fewer samples give no useful estimate of the scatter of their statistics.
LEAST_SAMPLES = 4


@dataclass(frozen=True)
class Drift:
    """Drift of one BatchNorm layer; root mean squares over its channels.

    Attributes:
        mean: ``(mu_batch - mu_running) / sigma_running``, in running standard deviations.
        variance: ``log(var_batch / var_running)``, in nats.
        mean_error: what the first would be from sampling alone.
        variance_error: what the second would be from sampling alone.
    """

    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    variance_error: Tensor

    @property
    def excess(self) -> Tensor:
        """Return the larger of the two ratios of drift and error: 1 is what sampling explains."""
        return torch.maximum(self.mean / self.mean_error, self.variance / self.variance_error)


def batch_norm_drift(x: Tensor, mean: Tensor, var: Tensor, *, eps: float = 1e-5, memory: float = 0.0) -> Drift:
    """Return how far batch statistics are from running ones, and how far sampling alone would put them.

    Samples are independent, positions within one sample are not: errors come from the scatter of the samples' own
    means and mean squares, over B samples. The running statistics scatter, too: an average with momentum m of
    independent batches has ``m / (2 - m)`` times the variance of one batch.

    Args:
        x: input of the layer in a training step, ``(B, C, ...)``.
        mean: running mean before the step, ``(C,)``.
        var: running variance, likewise.
        eps: of the layer.
        memory: variance of the running statistics in units of one batch's: ``m / (2 - m)``, or 1 / n for an average of
            n batches.

    Raises:
        ValueError: below 4 samples.

    Source: Ioffe & Szegedy 2015; the drift itself is what BatchNorm's eval mode is off by.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import batch_norm_drift
        >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]) + 3
        >>> result = batch_norm_drift(x, torch.zeros(1), torch.ones(1), eps=0.0)
        >>> round(float(result.mean), 3), round(float(result.mean_error), 3), round(float(result.variance), 3)
        (3.0, 0.577, 0.288)
    """
    samples = len(x)
    if samples < LEAST_SAMPLES:
        raise ValueError(
            f"{samples} samples are too few to estimate the scatter of their statistics: give {LEAST_SAMPLES} or more"
        )
    rows = x.detach().double().flatten(2) if x.ndim > 2 else x.detach().double()[..., None]  # (B, C, positions)
    mean, var = mean.double(), var.double() + eps
    count = samples * rows.shape[2]
    batch_mean = rows.mean((0, 2))
    squares = (rows - batch_mean[:, None]).square().mean(2) * (
        count / (count - 1)
    )  # unbiased, as the running variance is
    spread = squares.mean(0) + eps  # unbiased, as the running variance is
    scale = 1 + memory
    return Drift(
        mean=_rms((batch_mean - mean) / var.sqrt()),
        variance=_rms((spread / var).log()),
        mean_error=_rms((rows.mean(2).var(0) / samples * scale / var).sqrt()),
        variance_error=_rms((squares.var(0) / samples * scale).sqrt() / spread),
    )


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
