"""How heavy the tails of a layer's weights are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def excess_kurtosis(values: Tensor) -> tuple[Tensor, float]:
    """Return ``m_4 / m_2^2 - 3`` over all entries, and its standard error for as many normal numbers.

    0 is a normal distribution, -1.2 a uniform one (PyTorch's default initialisation). Of two initialisations with the
    same variance the one with heavy tails drives more units of tanh or the sigmoid into their flat regions.

    Args:
        values: of any shape.

    Returns:
        Kurtosis in float64, NaN for constant values or fewer than 4, and the standard error (NaN below 4).

    Source: Fisher's moments; the variance is exact for normal numbers (Anscombe & Glynn 1983).

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import excess_kurtosis
        >>> value, error = excess_kurtosis(torch.tensor([-1.0, 1.0]).repeat(500))
        >>> float(value), round(error, 3)  # two values: the least that there is
        (-2.0, 0.154)
    """
    n = values.numel()
    if n < 4:
        return torch.tensor(torch.nan, dtype=torch.float64), math.nan
    centred = values.detach().double()
    size = centred.abs().max()
    centred = centred / torch.where(size > 0, size, 1.0)  # in units of the largest, whose fourth power is a number
    centred = centred - centred.mean()
    m2 = centred.square().mean()
    error = math.sqrt(24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5)))
    # Constant up to the rounding of their mean.
    constant = (m2 <= torch.finfo(values.dtype).eps ** 2) | (size == 0)
    return torch.where(constant, torch.nan, centred.pow(4).mean() / m2**2 - 3), error
