"""Norms that neither overflow nor underflow, where squares of the entries would."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Norms of float32 vectors between these have lost nothing to overflow or underflow of squares.
LOW, HIGH = 1e-12, 1e18


def norm(v: Tensor, dim: int | None = None, *, keepdim: bool = False) -> Tensor:
    """Return ``||v||`` in float64: squares of float32 numbers below 1e-19 or above 1e19 leave the range of float32.

    Args:
        v: a tensor.
        dim: of the vectors; None is the norm of all numbers.
        keepdim: keep that axis, with length 1.

    Cost: on a CPU one pass in the type of v, and one in float64 where the first is not accurate.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import norm
        >>> v = torch.tensor([3e-30, 4e-30])
        >>> round(1e30 * float(norm(v)), 6), float(torch.linalg.vector_norm(v))
        (5.0, 0.0)
    """
    if v.dtype == torch.float32 and v.device.type == "cpu":  # a sum in float64 takes ten times as long there
        size = torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim)
        if bool(((size > LOW) & (size < HIGH)).all()):
            return size.double()
    return torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim, dtype=torch.float64)


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the `norm` of each tensor."""
    return [norm(t) for t in tensors]


def power_iteration(matrices: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the last two of ``v, A u(v), ...`` for a batch of matrices A, where u divides by the norm.

    Args:
        matrices: ``(*batch, n, n)``.
        start: ``(*batch, n)``.
        steps: products.
    """
    before = after = start
    for _ in range(steps):
        before, after = after, (matrices @ unit(after)[..., None])[..., 0]
    return before, after


def unit(v: Tensor) -> Tensor:
    """Return each row divided by its `norm`, in the type of v; rows of zeros stay.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import unit
        >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    size = norm(v, -1, keepdim=True)
    return (v / torch.where(size > 0, size, 1.0)).to(v.dtype)
