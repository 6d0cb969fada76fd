"""The share of one parameter in a Gram matrix of per-sample gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lsp_callbacks.operators.sgd.layer_rules import Use

#: How many numbers at a time stay in the processor's cache.
BLOCK = 2**19


@dataclass(frozen=True)
class Part:
    """All uses of a parameter on some of the samples."""

    samples: int
    uses: list[Use]

    def gradients(self, lo: int, hi: int) -> Tensor:
        """Return the gradients of samples lo to hi, ``(hi - lo, R, P)``."""
        return torch.stack([use.gradients(lo, hi) for use in self.uses]).sum(0)


@dataclass(frozen=True)
class ParameterGram:
    """The per-sample gradients of one parameter.

    Attributes:
        parts: the samples, part by part.
    """

    parts: list[Part] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Return how the gradients are computed: "structured", "layer" or "rows"."""
        return max((use.path for part in self.parts for use in part.uses), key=len, default="structured")

    def gram(self, root: Tensor, memory: int) -> Tensor:
        """Return ``(N R, N R)``, sample by sample, of the gradients times a factor.

        Args:
            root: the factor, a scalar or of the parameter's shape.
            memory: bound on the numbers held at once.
        """
        factors = [part.uses[0].factors for part in self.parts if len(part.uses) == 1]
        if len(factors) == len(self.parts) and all(factors):
            g, a = (wide(torch.cat([pair[k] for pair in factors if pair])) for k in (0, 1))
            if root.ndim:
                return _weighted(g, a, root.T if self.parts[0].uses[0].transposed else root)
            n, rows, _ = g.shape
            flat = (root * g).flatten(0, 1)
            share = flat @ flat.T
            return share.view(n, rows, n, rows).mul_((a @ a.T)[:, None, :, None]).view(n * rows, n * rows)
        blocks = [(part, lo, hi) for part in self.parts for lo, hi in _ranges(part, memory)]
        whole = root.reshape(-1) if root.ndim else root
        table: list[list[Tensor]] = [[] for _ in blocks]
        for i, (part, lo, hi) in enumerate(blocks):
            first = wide(part.gradients(lo, hi) * whole).flatten(0, 1)
            for j, (other, start, stop) in enumerate(blocks[: i + 1]):
                second = first if i == j else wide(other.gradients(start, stop) * whole).flatten(0, 1)
                table[i].append(first @ second.T)
        if len(table) == 1:
            return table[0][0]
        lower = [torch.cat(row, dim=1) for row in table]
        size = lower[-1].shape[1]
        square = torch.cat([F.pad(row, (0, size - row.shape[1])) for row in lower])
        return square.tril() + square.tril(-1).T


def _weighted(g: Tensor, a: Tensor, root: Tensor) -> Tensor:
    """Return ``sum_o g_io g_jo sum_k root_ok^2 a_ik a_jk``, a few outputs o at a time: no gradient is ever formed."""
    n, rows, _ = g.shape
    share = g.new_zeros(n, rows, n, rows)
    step = max(1, BLOCK // (n * (a.shape[1] + 3 * n)))
    for some, weights in zip(g.permute(2, 1, 0).split(step), root.to(a).split(step)):
        weighted = a * weights[:, None]  # (o, n, k)
        inner = weighted @ weighted.mT
        for r in range(rows):
            left = inner * some[:, r, :, None]
            for s in range(rows):
                share[:, r, :, s] += (left * some[:, s, None]).sum(0)
    return share.view(n * rows, n * rows)


def wide(t: Tensor) -> Tensor:
    """Return a tensor in at least float32: sums over many entries are never rounded to half precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _ranges(part: Part, memory: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples such that two blocks of gradients stay within the memory."""
    entries = part.gradients(0, 1).numel()
    step = max(1, memory // (2 * max(entries, 1)))
    return ((lo, min(lo + step, part.samples)) for lo in range(0, part.samples, step))
