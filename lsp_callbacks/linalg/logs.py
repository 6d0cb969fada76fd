"""Numbers that are stored as logarithms, because they grow or shrink without bound along a window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Beyond it ``e^x`` is no double.
LARGEST = math.log(torch.finfo(torch.float64).max)


def exp(log: float) -> float:
    """Return ``e^log``, and inf where that is no double: ``math.exp`` would raise.

    Example:
        >>> from lsp_callbacks.linalg.logs import exp
        >>> exp(0.0), exp(1e4), exp(-1e4)
        (1.0, inf, 0.0)
    """
    return math.exp(log) if log <= LARGEST or math.isnan(log) else math.inf


def log(value: float) -> float:
    """Return the logarithm; -inf for 0, NaN for negative numbers and NaN."""
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan


def rescale(rows: Tensor, size: int | None = None) -> tuple[Tensor, float]:
    """Return the rows divided by their largest entry, and its log; unchanged with log 0 if it is 0 or not finite.

    Args:
        rows: ``(k, n)``.
        size: look for the largest entry among so many columns, those of the parameters, unless they are 0. Second
            moments move by ``g * H v``, in units of their own: beside them the parameters' share may be so small that
            its square is 0 in float32.
    """
    scale = rows[..., :size].abs().max()
    scale = scale if float(scale) else rows.abs().max()
    if not bool(torch.isfinite(scale)) or float(scale) == 0.0:
        return rows, 0.0
    return rows / scale, float(scale.double().log())


def add(first: Tensor, first_log: float, second: Tensor, *, size: int | None = None) -> tuple[Tensor, float]:
    """Return ``e^first_log first + second``, rescaled, and the log by which it was divided."""
    first, first_scale = rescale(first, size)
    second, second_scale = rescale(second, size)
    logs = [
        first_scale + first_log if bool(first.any()) else -math.inf,
        second_scale if bool(second.any()) else -math.inf,
    ]
    most = max(logs)
    if most == -math.inf:  # both are 0
        return first + second, 0.0
    total, log = rescale(exp(logs[0] - most) * first + exp(logs[1] - most) * second, size)
    return total, most + log
