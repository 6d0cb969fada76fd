"""Whether somebody has changed parameters or gradients meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import plain_tensors

#: Numbers of a tensor that are looked at, about.
SOME = 2**10


def fingerprint(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor: in-place changes through ``.data`` leave no other mark."""
    with torch.no_grad():
        return [_sum(t if t.layout is torch.strided else t.to_dense()) for t in tensors]


def some_numbers(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return about a thousand numbers of each tensor, from all over it; of one that is contiguous a view.

    No usual change leaves all of them as they are. The distance is odd, so that they are of several columns.
    """
    flat = [(t if t.layout is torch.strided else t.to_dense()).reshape(-1) for t in tensors]
    return [t if len(t) <= SOME else t[:: len(t) // SOME | 1] for t in flat]


def in_one(parts: Sequence[Tensor]) -> Tensor:
    """Return a copy of vectors as one, on the CPU where they are on several devices."""
    if any([t.device != parts[0].device for t in parts]):
        parts = [t.cpu() for t in parts]
    return torch.cat([*parts]) if parts else torch.empty(0)


def identical(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal, each to the other of its pair, to the last bit; NaN equals NaN."""
    return all(_equal(a, b) for a, b in zip(these, those, strict=True))


def _sum(p: Tensor) -> Tensor:
    try:
        return p.sum(dtype=torch.float32)
    except NotImplementedError:  # quantised weights, which can be multiplied and little else
        return torch.stack([t.sum(dtype=torch.float32) for t in plain_tensors(p)]).sum()


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    # The quick way does not know that NaN equals NaN.
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
