"""The share of one parameter in a Gram matrix of per-sample gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsp_callbacks.operators.sgd.layer_rules import Outer, Table, Use, at_positions, dense
from lsp_callbacks.operators.sgd.reused_block import Block
from lsp_callbacks.operators.sgd.some_units import FEW_ENTRIES, TakenUnits, take_units
from lsp_callbacks.operators.sgd.weighted_gram import weighted_gram

#: Rows of outer products and their products, by their place in memory: weight and bias of a layer have the same.
Squares = dict[Any, tuple[Tensor, Tensor]]
_WIDE = (torch.float32, torch.float64)
#: Numbers that are formed at once of gradients that can be divided: larger blocks are no faster, and leave the heap of
#: a process in pieces.
BLOCK = 2**18


@dataclass(frozen=True)
class Traces(Mapping[str, float]):
    """The trace of each parameter's share in K, by name; computed where somebody asks, as where decays differ.

    Args:
        names: of all parameters.
        shares: of those that have one.
    """

    names: Sequence[str]
    shares: Mapping[str, Tensor]

    @cached_property
    def _values(self) -> dict[str, float]:
        traces = torch.stack([share.trace() for share in self.shares.values()]).tolist()
        return dict.fromkeys(self.names, 0.0) | dict(zip(self.shares, traces))

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Part:
    """All uses of a parameter on some of the samples."""

    samples: int
    uses: list[Use]

    def gradients(self, lo: int, hi: int) -> Tensor:
        """Return the gradients of samples lo to hi, ``(hi - lo, R, P)``."""
        first, *others = (use.gradients(lo, hi) for use in self.uses)
        return sum(others, first)

    def entries(self, lo: int, hi: int, blocks: Sequence[Block]) -> Tensor:
        """Return entries lo to hi of the gradients of all samples, ``(N R, hi - lo)``, in a block for each use."""
        pairs = zip(self.uses, blocks)
        first, *others = (use.entries(lo, hi, block) for use, block in pairs if use.entries is not None)
        return sum(others, first).flatten(0, 1)

    def tensors(self) -> tuple[int, list[Any]] | None:
        """Return what the part is made from, on the CPU, for `of`; None where that is more than outer products."""
        if any(use.outer is None and use.values is None for use in self.uses):
            return None
        made: list[Any] = []
        for use in self.uses:
            if use.outer is None:
                made.append(_sent(use.values))
            else:
                rows = [_sent(t.unflatten(0, (self.samples, use.rows))) for t in (use.outer.a, use.outer.g)]
                made.append((*rows, use.outer.transposed))
        return self.samples, made

    @classmethod
    def of(cls, tensors: tuple[int, list[Any]], device: torch.device) -> Part:
        """Return the part that `tensors` were taken from."""
        samples, made = tensors
        uses = [
            dense(use.to(device))
            if isinstance(use, Tensor)
            else at_positions(use[0].to(device), use[1].to(device), transposed=use[2])
            for use in made
        ]
        return cls(samples, uses)

    @property
    def rows(self) -> int:
        """N R."""
        return self.samples * max((use.rows for use in self.uses), default=1)

    @property
    def width(self) -> int | None:
        """What the ranges of `entries` are multiples of; None where gradients are only formed all at once."""
        if not self.uses or any(use.entries is None for use in self.uses):
            return None
        return max(use.width for use in self.uses)


@dataclass(frozen=True)
class ParameterGram:
    """The per-sample gradients of one parameter.

    Attributes:
        parts: the samples, part by part.
    """

    parts: list[Part] = field(default_factory=list)

    @classmethod
    def taken_from(cls, parts: Sequence[dict[str, Part]], name: str) -> ParameterGram:
        """Return the gradients of a parameter, taken out of all parts, so that they are let go of once it is formed."""
        return cls([part.pop(name) for part in parts])

    @property
    def rows(self) -> int:
        """Return N R."""
        return sum(part.rows for part in self.parts)

    @property
    def path(self) -> str:
        """Return how the gradients are computed: "structured", "layer" or "rows"."""
        return max((use.path for part in self.parts for use in part.uses), key=len, default="structured")

    def gram(
        self, scale: Tensor | float, memory: int, entries: int, squares: Squares | None = None,
        *, fraction: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Return ``(N R, N R)``, sample by sample: the products of gradients behind the diagonal of D.

        Args:
            scale: the diagonal, a number or of the parameter's shape.
            memory: bound on the numbers held at once.
            entries: of the parameter.
            squares: of other parameters; filled.
            fraction: by which some units of large layers are taken, see `take_units`; None takes all.
        """
        if isinstance(scale, Tensor) and scale.ndim:
            return self._behind(wide(scale), memory, entries, None, fraction)
        share = self._behind(None, memory, entries, squares, fraction)
        return share if scale == 1 else share * scale

    def _behind(
        self, scale: Tensor | None, memory: int, entries: int, squares: Squares | None, fraction: float | None
    ) -> Tensor:
        alone = [part.uses[0] for part in self.parts if len(part.uses) == 1]
        if len(alone) == len(self.parts):
            outer = [use.outer for use in alone if use.outer is not None]
            if len(outer) == len(alone):
                return _outer_gram(outer[0] if len(outer) == 1 else Outer.joined(outer), scale, squares)
            values = [use.values for use in alone if use.values is not None]
            if len(values) == len(alone):
                return _held_gram(values[0] if len(values) == 1 else torch.cat(values), scale, squares)
        if len(self.parts) == 1 and (split := _tied(self.parts[0].uses)) is not None:
            return _table_gram(*split, scale, memory)
        units = [use.units for use in alone if use.units is not None]
        if fraction is not None and entries > FEW_ENTRIES and len(units) == len(self.parts):
            taken = take_units(units, scale, fraction)
            if taken is not None:
                return self._of_units(taken)
        return self._dense(scale, memory, entries)

    def _of_units(self, taken: TakenUnits) -> Tensor:
        """Return the share from the gradients of some units."""
        roots = taken.weights.sqrt()
        step = max(1, BLOCK // (self.rows * roots.shape[1]))
        share: Tensor | None = None
        for index, root in zip(taken.index.split(step), roots.split(step)):
            some = [units.entries(index).flatten(0, 1) for units in taken.units]
            block = wide(torch.cat(some) if len(some) > 1 else some[0])
            block = block * root.flatten()
            share = block @ block.T if share is None else share.addmm_(block, block.T)
        assert share is not None
        return share

    def blocks(self, root: Tensor | None, entries: int) -> Iterator[tuple[int, Tensor]]:
        """Yield some entries of all gradients after the other, ``(N R, b)`` times the root, and where they begin.

        No more is held at once than stays in the processor's cache; what cannot be divided comes in one piece. Each
        overwrites the one before.
        """
        widths = [part.width for part in self.parts]
        is_held = len(widths) == 1 and (None in widths or any(use.values is not None for use in self.parts[0].uses))
        memory = [[Block() for _ in part.uses] for part in self.parts]
        size = math.lcm(*(width or entries for width in widths))
        step = max(1, BLOCK // max(self.rows * size, 1)) * size
        for lo in range(0, entries, step):
            hi = min(lo + step, entries)
            some = [
                part.gradients(0, part.samples).flatten(0, 1) if width is None else part.entries(lo, hi, held)
                for part, width, held in zip(self.parts, widths, memory)
            ]
            block = wide(torch.cat(some) if len(some) > 1 else some[0])
            if root is not None:
                block = block * root[lo:hi] if is_held else block.mul_(root[lo:hi])
            yield lo, block

    def _dense(self, scale: Tensor | None, memory: int, entries: int) -> Tensor:
        root = None if scale is None else scale.sqrt().reshape(-1)
        if all(part.width is not None for part in self.parts):
            share: Tensor | None = None
            for _, some in self.blocks(root, entries):
                share = some @ some.T if share is None else share.addmm_(some, some.T)
            if share is not None:
                return share
        blocks = [(part, lo, hi) for part in self.parts for lo, hi in _ranges(part, memory, entries)]

        def rows(part: Part, lo: int, hi: int) -> Tensor:
            gradients = wide(part.gradients(lo, hi)).flatten(0, 1)
            return gradients if root is None else gradients * root

        table: list[list[Tensor]] = [[] for _ in blocks]
        for i, block in enumerate(blocks):
            first = rows(*block)
            for j, other in enumerate(blocks[: i + 1]):
                table[i].append(first @ (first if i == j else rows(*other)).T)
        if len(table) == 1:
            return table[0][0]
        lower = [torch.cat(row, dim=1) for row in table]
        size = lower[-1].shape[1]
        square = torch.cat([F.pad(row, (0, size - row.shape[1])) for row in lower])
        return square.tril() + square.tril(-1).T


def shares_of(
    grams: Mapping[str, ParameterGram], scales: Mapping[str, Tensor], memory: int, entries: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the share of each parameter, see `ParameterGram.gram`, and how it was computed, by name."""
    shares = {name: gram.gram(scales[name], memory, entries[name]) for name, gram in grams.items()}
    return shares, {name: gram.path for name, gram in grams.items()}


def _held_gram(values: Tensor, scale: Tensor | None, squares: Squares | None) -> Tensor:
    rows = wide(values).flatten(0, 1)
    if scale is not None:
        rows = rows * scale.sqrt().reshape(-1)
    elif squares and (rows_and_products := squares.get(_place(rows))) is not None:
        return rows_and_products[1]
    return rows @ rows.T


def _place(rows: Tensor) -> Any:
    return rows.data_ptr(), rows.shape, rows.stride()


def _outer_gram(pair: Outer, scale: Tensor | None, squares: Squares | None = None) -> Tensor:
    """Return ``sum_kl D_kl g_ik g_jk a_il a_jl``."""
    g, a = wide(pair.g), wide(pair.a)
    if scale is None:
        square = g @ g.T
        if squares is not None:
            squares[_place(g)] = g, square
        return (a @ a.T).mul_(square)
    return weighted_gram(g, a, scale.T if pair.transposed else scale)


def _tied(uses: list[Use]) -> tuple[Table, Outer | None] | None:
    """Return the two uses of a table that is looked up and, tied, multiplied by the last hidden state."""
    tables, outers = [use.table for use in uses if use.table], [use.outer for use in uses if use.outer]
    if len(tables) == 1 and len(outers) == len(uses) - 1 <= 1 and not any(outer.transposed for outer in outers):
        return tables[0], outers[0] if outers else None
    return None


def _table_gram(table: Table, outer: Outer | None, scale: Tensor | None, memory: int) -> Tensor:
    """Return the Gram matrix of gradients that are zero but in the rows of a table that a sample looks up.

    Only rows that occur are held. Where the table is the matrix of the last layer, too, ``W_v h``, the gradients of
    that use are outer products, and the two uses of a row meet where the sample's tokens do.
    """
    e, index = wide(table.g), table.index  # (N, R, T, d) and (N, T)
    n, rows, _, width = e.shape
    tokens, place = index.unique(return_inverse=True)
    weight = None if scale is None else scale[tokens].sqrt_()  # (U, d)
    step = max(1, min(width, min(memory, 4 * BLOCK) // (2 * n * rows * len(tokens))))
    share = e.new_zeros(n * rows, n * rows)
    for lo in range(0, width, step):
        some = e[..., lo : lo + step]
        held = e.new_zeros(n, rows, len(tokens), some.shape[-1])
        held.scatter_add_(2, place[:, None, :, None].expand(some.shape), some)
        if weight is not None:
            held *= weight[:, lo : lo + step]
        flat = held.flatten(2).flatten(0, 1)
        share += flat @ flat.T
    if outer is None:
        return share
    g, a = wide(outer.g), wide(outer.a)
    share += _outer_gram(outer, scale)
    lookups = e.transpose(1, 2) if weight is None else e.transpose(1, 2) * weight[place][:, :, None] ** 2
    inner = lookups @ a.T  # (N, T, R, M)
    cross = (inner * g.T[index][:, :, None]).sum(1).flatten(0, 1)
    return share + cross + cross.T


def _sent(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.detach().cpu().clone(memory_format=torch.contiguous_format)  # without the memory that it is a view of


def wide(t: Tensor) -> Tensor:
    """Return a tensor in at least float32: sums over many entries are never rounded to half precision."""
    return t if t.dtype in _WIDE else t.to(torch.promote_types(t.dtype, torch.float32))


def _ranges(part: Part, memory: int, entries: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples such that two blocks of gradients stay within the memory."""
    rows = max((use.rows for use in part.uses), default=1)
    step = max(1, memory // (2 * max(entries * rows, 1)))
    return ((lo, min(lo + step, part.samples)) for lo in range(0, part.samples, step))
