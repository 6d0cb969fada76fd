"""Which samples of a batch have a row in its Gram matrix, where not all have."""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_rows(sizes: Tensor, count: int, offset: float) -> tuple[Tensor, Tensor]:
    """Return the indices of ``count`` samples of N, and the probabilities by which they were taken.

    A sample is taken with a probability in proportion to its size, at most 1: where few samples of a batch are still
    uncertain they have all that there is of curvature, and none of them is missed. A sample that is taken stands for
    one over its probability.

    Args:
        sizes: ``(N,)``, not negative.
        count: how many to take.
        offset: in [0, 1), by chance; the samples are taken at equal distances in the sum of the probabilities.
    """
    n = len(sizes)
    if count >= n:
        return torch.arange(n), torch.ones(n, dtype=torch.float64)
    size = sizes.double().cpu()
    size = size / size.max() if float(size.max()) > 0 else torch.ones_like(size)
    size = size.clamp_min(1e-9)
    chance = torch.zeros_like(size)
    sure = torch.zeros(n, dtype=torch.bool)
    while True:  # those that are sure leave less to share for the others
        left = count - int(sure.sum())
        chance = torch.where(sure, 1.0, left * size / size[~sure].sum())
        more = (chance >= 1) & ~sure
        if not bool(more.any()):
            break
        sure |= more
    at = torch.arange(count, dtype=torch.float64) + offset
    taken = torch.searchsorted(chance.cumsum(0), at, right=True).clamp_(max=n - 1).unique()
    return taken, chance[taken]
