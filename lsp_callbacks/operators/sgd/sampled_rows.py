"""Which samples of a batch have a row in its Gram matrix, where not all have."""

from __future__ import annotations

import numpy as np
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
    size = sizes.double().cpu().numpy()
    largest = float(size.max())
    size = np.maximum(size / largest, 1e-9) if largest > 0 else np.ones(n)
    falling = np.sort(size)[::-1]
    rest = falling[::-1].cumsum()[::-1]  # of each one, and of those that are smaller
    left = count - np.arange(n)
    sure = int((left * falling < rest).argmax())  # those that are sure leave less to share for the others
    chance = np.minimum(size * ((count - sure) / rest[sure]), 1.0)
    at = np.minimum(np.searchsorted(chance.cumsum(), np.arange(count) + offset, side="right"), n - 1)
    taken = at[np.diff(at, prepend=-1) > 0]
    return torch.from_numpy(taken), torch.from_numpy(chance[taken])
