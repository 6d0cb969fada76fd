"""Memory for entries of per-sample gradients that are formed one block after the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Block:
    """Memory of some entries of products, used again for the next ones.

    The allocator of Linux (glibc 2.36) seldom finds room for an aligned block in the place that another of its size has
    left: blocks that are formed one after the other leave up to half of their bytes in the heap of the process.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def product(self, order: str, g: Tensor, a: Tensor) -> Tensor:
        """Return what ``einsum`` does, entries flat, ``(n, r, b)``; it is overwritten by the next product.

        Args:
            order: of ``nrto,nti`` (a sum over positions) or ``nro,nri``, to ``nroi`` or ``nrio``.
            g: gradients at the output.
            a: inputs.
        """
        is_transposed = order.endswith("io")
        if g.requires_grad or a.requires_grad or g.dtype != a.dtype or g.device.type != "cpu":
            return torch.einsum(order, g, a).flatten(2)
        n, rows, width, height = *g.shape[:2], g.shape[-1], a.shape[-1]
        if self._numbers is None or len(self._numbers) < n * rows * width * height:
            self._numbers = g.new_empty(n * rows * width * height)
        flat = self._numbers[: n * rows * width * height]
        if g.ndim == 3:
            left, right = (a, g) if is_transposed else (g, a)
            torch.mul(left[..., None], right[..., None, :], out=flat.view(*left.shape, right.shape[-1]))
        elif is_transposed:
            left = a[:, None].expand(-1, rows, -1, -1).transpose(2, 3).flatten(0, 1)
            torch.bmm(left, g.flatten(0, 1), out=flat.view(n * rows, height, width))
        else:
            torch.bmm(g.transpose(2, 3).flatten(1, 2), a, out=flat.view(n, rows * width, height))
        return flat.view(n, rows, width * height)
