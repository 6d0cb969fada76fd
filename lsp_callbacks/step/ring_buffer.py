"""The last values of several series, each on its own device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class RingBuffer:
    """The last ``length`` values of several series, which are written together and read in their order.

    Args:
        length: how many values of each are kept.
    """

    def __init__(self, length: int):
        self.length = length
        self.reset()

    def reset(self) -> None:
        """Forget all series."""
        self._rings: dict[str, Tensor] = {}
        self.count = 0

    def __len__(self) -> int:
        return min(self.count, self.length)

    def restart(self) -> None:
        """Begin anew with the same series."""
        self.count = 0

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Add one number to each series; it stays on its device, which is not waited for."""
        for name, value in values.items():
            self._ring(name, value)[self.count % self.length] = value.reshape(())
        self.count += 1

    def _ring(self, name: str, like: Tensor) -> Tensor:
        ring = self._rings.get(name)
        if ring is None or ring.device != like.device:  # of a checkpoint: the first copy would wait for the device
            dtype = torch.promote_types(like.dtype, torch.float32)
            ring = torch.full((self.length,), math.nan, dtype=dtype) if ring is None else ring
            ring = self._rings[name] = ring.to(like.device, dtype)
        return ring

    def read(self) -> dict[str, Tensor]:
        """Return the series by name, oldest value first, in float64 on the CPU."""
        start = self.count % self.length if self.count > self.length else 0
        return {name: ring.roll(-start)[: len(self)].double().cpu() for name, ring in self._rings.items()}

    def load(self, series: Mapping[str, Tensor]) -> None:
        """Continue series that `read` returned."""
        for name, values in series.items():
            kept = values[-self.length :]
            self.count = len(kept)
            ring = self._rings[name] = torch.full((self.length,), math.nan, dtype=torch.float64)
            ring[: len(kept)] = kept
