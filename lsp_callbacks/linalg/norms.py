"""Norms that neither overflow nor underflow, where squares of the entries would, and accurate inner products."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Norms of float32 vectors between these have lost nothing to overflow or underflow of squares.
LOW, HIGH = 1e-12, 1e18
#: Products that are summed in float32, before the sums are summed in float64; and inner products from which on those
#: that have lost digits to underflow do not count.
_CHUNK, _LEAST = 1024, 1e-24


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
        is_accurate = LOW < float(size) < HIGH if dim is None else bool(((size > LOW) & (size < HIGH)).all())
        if is_accurate:
            return size.double()
    return torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim, dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> float:
    """Return ``<a, b>`` of flat vectors, accurate to some ``1e-7 ||a|| ||b||`` whatever their length.

    On a CPU sums of 1024 products are taken in float32, and their sum in float64, which takes half the time of a
    conversion of both; where that may have underflowed or has overflowed, all of it is in float64.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import inner
        >>> inner(torch.tensor([1e-30, 0.0]), torch.tensor([1e-30, 2.0]))  # doctest: +ELLIPSIS
        1.0...e-60
    """
    if len(a) >= _CHUNK and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu":
        whole = len(a) // _CHUNK * _CHUNK
        rows, columns = a[:whole].view(-1, _CHUNK), b[:whole].view(-1, _CHUNK)
        product = float(torch.linalg.vecdot(rows, columns).sum(dtype=torch.float64) + torch.dot(a[whole:], b[whole:]))
        if _LEAST < abs(product) < HIGH:
            return product
    return float(a.double() @ b.double())


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
