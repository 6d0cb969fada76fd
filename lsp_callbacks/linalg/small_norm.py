"""The operator norm of a matrix with few rows or columns, which takes less time than to follow it by products."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.linalg.followed_norm import FollowedNorm

#: Rows or columns, at most.
FEW = 64


def is_small(matrix: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether the matrix of an operator is at hand and has few rows or columns."""
    return matrix is not None and matrix.ndim == 2 and min(matrix.shape) <= FEW


def small_norm(matrix: Tensor) -> FollowedNorm:
    """Return ``||A||_2`` from the Gram matrix of the rows or the columns, exact but for rounding.

    The Gram matrix is formed in float64, of numbers divided by the largest, so that it neither overflows nor vanishes.

    Args:
        matrix: ``(m, n)``.

    Cost: ``min(m, n)^2 max(m, n)`` multiplications, and the eigenvalues of the smaller Gram matrix.
    """
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    value = largest
    if np.isfinite(largest) and largest > 0:
        wide = wide / largest
        value *= max(0.0, float(np.linalg.eigvalsh((wide @ wide.mT).cpu().numpy())[-1])) ** 0.5
    norm = torch.tensor(value if np.isfinite(value) else np.nan, dtype=torch.float64)
    return FollowedNorm(norm, 0 * norm, matrix.new_empty(0, matrix.shape[1]))
