"""Distances between vectors that are not stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

#: A prime, so that the columns of no usual matrix fall into one bucket.
BUCKETS = 509


class Sketch:
    """A random linear map S to few numbers with ``E ||S v||^2 = ||v||^2``.

    Each entry of v, with a random sign, is added to one of the numbers, by default 509. So the distance to an earlier
    point needs 509 numbers, where the point itself would be as large as the model. Relative standard deviation of
    ``||S v||^2``: ``sqrt(2 / 509)``, 6 %, if v is spread over many entries. For a path of vectors the error is nearly
    the same at each, so that ratios are more accurate.

    Args:
        seed: of the signs, which are the same on every device.
        keep: store the signs, a byte for each entry, for the next call; otherwise they are drawn again.
        buckets: how many numbers.

    Source: Charikar, Chen & Farach-Colton 2002 (count sketch); Alon, Matias & Szegedy 1996.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import Sketch
        >>> a, b = torch.ones(40_000), torch.linspace(0, 1, 40_000)
        >>> sketch = Sketch()
        >>> ratio = (sketch([a]) - sketch([b])).square().sum() / (a - b).square().sum()
        >>> bool(0.8 < ratio < 1.2)
        True
    """

    def __init__(self, seed: int = 0, *, keep: bool = False, buckets: int = BUCKETS):
        self.seed, self.keep, self.buckets = seed, keep, buckets
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def __call__(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return ``S v`` of the vector that the tensors form, ``(buckets,)`` in float64 on the device of the first."""
        total: Tensor | None = None
        for index, tensor in enumerate(tensors):
            flat = tensor.detach().reshape(-1)
            signs, shift = self._signs(index, flat)
            padded = F.pad(flat * signs, (0, -len(flat) % self.buckets))
            part = padded.view(-1, self.buckets).sum(0, dtype=torch.float64).roll(shift)
            total = part if total is None else total + part.to(total.device)
        return torch.zeros(self.buckets, dtype=torch.float64) if total is None else total

    def _signs(self, index: int, like: Tensor) -> tuple[Tensor, int]:
        kept = self._kept.get(index)
        if kept is not None and len(kept[0]) == len(like) and kept[0].device == like.device:
            return kept
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        shift = int(torch.randint(self.buckets, (), generator=generator))
        signs = torch.randint(2, (len(like),), generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(like.device)
        if self.keep:
            self._kept[index] = (signs, shift)
        return signs, shift
