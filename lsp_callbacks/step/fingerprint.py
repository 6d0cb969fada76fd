"""Whether somebody has changed parameters or gradients meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import plain_tensors

#: Numbers of a tensor of which all are added up, and rows of a larger one, about.
FEW, ROWS = 2**10, 4


def fingerprint(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor: in-place changes through ``.data`` leave no other mark."""
    with torch.no_grad():
        return [_sum(t if t.layout is torch.strided else t.to_dense()) for t in tensors]


def sums_of_rows(tensors: Iterable[Tensor]) -> list[float]:
    """Return sums of some rows of each tensor, which no change leaves as they are that is made to all of them."""
    with torch.no_grad():
        sums = [_sum(_some_rows(t) if t.layout is torch.strided else t.to_dense()) for t in tensors]
        return torch.stack(sums).tolist() if len({t.device for t in sums}) == 1 else [float(t) for t in sums]


def _some_rows(t: Tensor) -> Tensor:
    return t if t.numel() <= FEW or len(t) < 2 * ROWS else t[:: len(t) // ROWS]


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
