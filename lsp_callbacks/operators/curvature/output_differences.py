"""Differences of the criterion's gradient with respect to the outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.linalg import norm


def differentiated_twice(product: Callable[[Tensor], Tensor], criterion: Callable[[Tensor], Tensor], f: Tensor) -> bool:
    """Whether a product is that of a central difference of the criterion's gradients, at one of some distances.

    Outputs near 0, or far from their targets, say little of how far to go: the first is relative to their size.
    """
    v = torch.randn(f.shape, generator=torch.Generator().manual_seed(0)).to(f)
    precision, size = torch.finfo(f.dtype).eps, float(norm(f.detach())) / f.numel() ** 0.5 or 1.0
    found = product(v)

    def gradient(moved: Tensor) -> Tensor:
        moved = moved.requires_grad_()
        with torch.enable_grad():
            return len(f) * torch.autograd.grad(criterion(moved), moved)[0]

    for far in (1.0, 8.0, 64.0, 512.0, 1 / 8):
        distance = far * 8.7 * precision**0.5 * size
        ahead, behind = (gradient(f.detach() + sign * distance * v) for sign in (1.0, -1.0))
        central = (ahead - behind) / (2 * distance)
        rounding = 4 * precision * float(norm(ahead)) / distance
        defect, change = float(norm(found - central)), float(norm(central))
        if defect <= 0.01 * change + min(rounding, 0.02 * change):
            return True
        if far > 100 and max(change, float(norm(found))) <= rounding:
            return True
    return False
