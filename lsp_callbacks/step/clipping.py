"""Gradient clipping as a differentiable map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """How a step's gradient is clipped before the optimizer uses it, as ``torch.nn.utils`` does.

    By norm ``g -> min(1, limit / (||g|| + 1e-6)) g``, over all parameters of the optimizer together; by value each
    number to ``[-limit, limit]``.

    Args:
        limit: the largest norm, or the largest number.
        kind: "norm" or "value".

    Raises:
        ValueError: for another kind, or a limit that is not positive.
    """

    limit: float
    kind: Literal["norm", "value"] = "norm"

    def __post_init__(self):
        if self.kind not in ("norm", "value") or not self.limit > 0:
            raise ValueError(f"Clipping({self.limit!r}, {self.kind!r}): give 'norm' or 'value' and a positive limit")

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return the clipped gradient, from the flat one of all parameters of the optimizer; differentiable."""
        if self.kind == "value":
            return gradient.clamp(-self.limit, self.limit)
        return gradient * (self.limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)

    def factor(self, gradient: Tensor) -> Tensor:
        """Return what a small change of the gradient is multiplied with while this step's factor is held fixed.

        By norm that is one number; by value it is 1 for each number of the gradient, or 0 where it is clipped.
        """
        if self.kind == "value":
            return (gradient.abs() <= self.limit).to(gradient.dtype)
        return (self.limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)

    def change(self, gradient: Tensor, change: Tensor) -> Tensor:
        """Return the change of the clipped gradient, to first order, for a change of the gradient.

        By norm ``kappa (dg - g <g, dg> / (||g|| (||g|| + 1e-6)))`` where that is active, with kappa the factor.
        """
        factor = self.factor(gradient)
        if self.kind == "value" or float(factor) == 1:
            return factor * change
        size = torch.linalg.vector_norm(gradient)
        along = torch.dot(gradient / size.clamp_min(torch.finfo(size.dtype).tiny), change.to(gradient))
        return factor * (change - gradient * (along / (size + 1e-6)))
