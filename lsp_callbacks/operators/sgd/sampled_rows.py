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
    largest = float(size.max())
    size = (size / largest).clamp_min_(1e-9) if largest > 0 else torch.ones_like(size)
    falling = size.sort(descending=True).values
    rest = falling.flip(0).cumsum(0).flip(0)  # of each one, and of those that are smaller
    left = count - torch.arange(n, dtype=torch.float64)
    sure = int((left * falling < rest).int().argmax())  # those that are sure leave less to share for the others
    chance = (size * ((count - sure) / rest[sure])).clamp_max_(1.0)
    at = torch.arange(count, dtype=torch.float64) + offset
    taken = torch.searchsorted(chance.cumsum(0), at, right=True).clamp_(max=n - 1).unique()
    return taken, chance[taken]
