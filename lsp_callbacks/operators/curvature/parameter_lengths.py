"""The sizes of tensors, in units of which differences displace them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import foreach_norm
from lsp_callbacks.linalg import norms
from lsp_callbacks.linalg.operator import HIGH, LOW


def lengths(parameters: Sequence[Tensor], sizes: Sequence[float] | None = None) -> list[float] | None:
    """Return the norm of an average row of each tensor, at least a tenth of the median; None where all are 0.

    Args:
        parameters: the tensors.
        sizes: their norms, if they are known.
    """
    sizes = sizes_of([p.detach() for p in parameters]) if sizes is None else sizes
    values = [float(size) / max(1, len(p) if p.ndim else 1) ** 0.5 for size, p in zip(sizes, parameters)]
    typical = sorted(values)[len(values) // 2] or min((x for x in values if x > 0), default=0.0)
    return [max(x, 0.1 * typical) for x in values] if typical > 0 else None


def sizes_of(parts: list[Tensor] | tuple[Tensor, ...], order: float = 2.0) -> list[float]:
    """Return the norm of each part."""
    sizes = torch.stack(foreach_norm(parts, order)).tolist()
    is_accurate = order != 2.0 or all(LOW < size < HIGH for size in sizes)
    return sizes if is_accurate else torch.stack(norms(parts)).tolist()
