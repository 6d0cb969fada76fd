"""A tensor of several samples as one row for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The numbers of each sample as one row, whatever the position of the sample axis; at least in float32.

    Args:
        like: a tensor of the shape and type that `back` returns.
        axis: the axis of the samples.
    """

    like: Tensor
    axis: int = 0

    @property
    def samples(self) -> int:
        """Return how many samples there are."""
        return self.like.shape[self.axis]

    @property
    def length(self) -> int:
        """Return how many numbers a sample has."""
        return self.like.numel() // max(1, self.samples)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the rows."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def flat(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor, ``(samples, length)``."""
        return tensor.movedim(self.axis, 0).reshape(self.samples, -1).to(self.dtype)

    def back(self, rows: Tensor) -> Tensor:
        """Return the tensor that has these rows: the inverse of `flat`."""
        shape = self.like.movedim(self.axis, 0).shape
        return rows.reshape(shape).movedim(0, self.axis).to(self.like.dtype)
