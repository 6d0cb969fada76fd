"""Rows of the Gram matrix in few numbers, so that those of earlier steps can be kept beside those of this one."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, wide

#: Numbers that a row is kept in.
SIZE = 2**16
#: Signs before they repeat: a prime, so that numbers that are added up have signs of their own.
PERIOD = 65_537


class RowSketch:
    """Count sketch of rows: number j of a row is added, with a random sign, to number ``j mod m`` of its sketch.

    Products of sketches are those of the rows with a random error of ``|x| |y| / sqrt(m)``, 0.4 % of the rows' sizes,
    and no error at all for networks of at most m parameters. The signs are the same at every step.

    Args:
        rows: how many.
        like: of the type and on the device of the rows.

    Attributes:
        values: ``(rows, m)``.

    Cost: one addition for each number.
    Source: Charikar, Chen & Farach-Colton 2002.
    """

    def __init__(self, rows: int, like: Tensor, size: int = SIZE):
        self.values = like.new_zeros(rows, size)
        generator = torch.Generator().manual_seed(0)
        self._signs = (torch.randint(0, 2, (PERIOD,), generator=generator) * 2 - 1).to(like)

    def share(self, gram: ParameterGram, scale: Tensor, begin: int, entries: int) -> Tensor:
        """Add the gradients of one parameter, and return its share in the Gram matrix, ``(rows, rows)``.

        Args:
            gram: the gradients.
            scale: the diagonal of D, a scalar or of the parameter's shape.
            begin: place of its first entry among all parameters.
            entries: of the parameter.
        """
        share = self.values.new_zeros(len(self.values), len(self.values))
        roots = self._signs_at(begin, entries) * wide(scale).sqrt().reshape(-1)
        for lo, block in gram.blocks(roots, entries):
            share.addmm_(block, block.T)  # in which signs drop out
            self._place(begin + lo, block)
        return share

    def _signs_at(self, lo: int, count: int) -> Tensor:
        shift = lo % PERIOD
        return self._signs.roll(-shift).repeat(-(-count // PERIOD))[:count]

    def add(self, lo: int, block: Tensor) -> None:
        """Add entries lo, lo + 1, ... of all rows, ``(rows, b)``."""
        self._place(lo, block * self._signs_at(lo, block.shape[1]))

    def _place(self, lo: int, signed: Tensor) -> None:
        size, count = self.values.shape[1], signed.shape[1]
        begin = lo % size
        head = min(count, size - begin) if begin else 0
        if head:
            self.values[:, begin : begin + head] += signed[:, :head]
        whole = (count - head) // size * size
        if whole:
            self.values += signed[:, head : head + whole].unflatten(1, (-1, size)).sum(1)
        rest = signed[:, head + whole :]
        self.values[:, : rest.shape[1]] += rest


class RecentRows:
    """The rows of the last readings, one of each sample at a time.

    A sample of a batch with many positions has, from one pass, a row at one of them. Those of earlier steps take the
    place of passes for further positions: the curvature moves little from one reading to the next, and other samples
    tell more than other positions of the same ones. A step counts as it was when it was read, with its own weights and
    preconditioner, so that what is new shows in full once all rows were replaced.

    Attributes:
        most: how many rows of each sample are kept.
    """

    def __init__(self, most: int = 1):
        self.most = most
        self._rows: deque[Tensor] = deque()
        self._stands: deque[Tensor] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sketch: Tensor, stands: Tensor) -> None:
        """Add the rows of one step, ``(N, R, m)``, each as if it stood for its whole sample.

        Args:
            sketch: the rows.
            stands: for how many positions each of them stands then, ``(N, R)``.
        """
        if self._rows and self._rows[0].shape != sketch[:, 0].shape:
            self._rows.clear()
            self._stands.clear()
        self._rows.extend(sketch.unbind(1))
        self._stands.extend(stands.unbind(1))
        while len(self._rows) > self.most:
            self._rows.popleft()
            self._stands.popleft()

    @property
    def stands(self) -> Tensor:
        """For how many positions of its sample each row stands, ``(N, R)``."""
        return torch.stack([*self._stands], dim=1)

    def gram(self) -> Tensor:
        """Return ``(N R, N R)``, sample by sample, of all that is kept, in float64 on the CPU."""
        rows = torch.stack([*self._rows], dim=1)
        flat = rows.flatten(0, 1)
        return (flat @ flat.T).double().cpu() / rows.shape[1]
