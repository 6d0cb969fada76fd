"""Whether somebody has changed parameters or gradients meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module) -> list[Tensor]:
    """Return the sum of each parameter: in-place changes through ``.data`` leave no other mark."""
    return [p.detach().sum(dtype=torch.float32) for p in module.parameters()]


def identical(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit; NaN equals NaN."""
    return torch.allclose(a.to_dense(), b.to_dense(), rtol=0.0, atol=0.0, equal_nan=True)
