"""One optimizer step compressed onto the plane of its sharp mode, without vectors over the whole state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg import inner, total_norm, unit
from lsp_callbacks.linalg.vector_parts import VectorParts
from lsp_callbacks.operators.curvature.hessian import Method, hessian
from lsp_callbacks.operators.parts_of_shards import parts_of_vectors
from lsp_callbacks.operators.trajectory.formula_tangent import (
    GRADIENT,
    THETA,
    FormulaTangent,
    formula_tangent,
    state_blocks,
)
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_change
from lsp_callbacks.operators.trajectory.proximal import proximal_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import accurate_hessian
from lsp_callbacks.operators.trajectory.update_rules import formula, reciprocal
from lsp_callbacks.step.snapshot import Snapshot


@dataclass(frozen=True)
class PlaneStep:
    """One step on the plane ``V`` of its sharp mode, see `lsp_callbacks.functional.plane_map`.

    Attributes:
        drift: what ``V^+ A V`` would be at a fixed gradient, ``(k, k)``, float64 on the CPU.
        curvature: what the change of the gradient adds to it.
        rest: direction of what else the optimizer remembers; empty or 0 where there is nothing.
        remembers: whether there is something; of shards, on any process.
    """

    drift: Tensor
    curvature: Tensor
    rest: Tensor
    remembers: bool

    @property
    def whole(self) -> Tensor:
        """Return ``V^+ A V``."""
        return self.drift + self.curvature


def step_on_plane(
    snapshot: Snapshot,
    mode: Tensor,
    root: Tensor | float = 1.0,
    *,
    buffer_scale: Tensor | float | None = None,
    rest: Tensor | None = None,
    method: Method = "auto",
    eigenvalue: float | None = None,
) -> PlaneStep:
    """Return ``V^+ A V`` of one step of an optimizer with a formula, as `plane_map` of its `update_jacobian`.

    A is a diagonal by blocks but for ``H v``, so that each entry is a sum of inner products of the mode, of ``H v``,
    and of the rest, weighted by the formula's derivatives; under SGD these are numbers, and ``<mode, H v>`` is all that
    depends on the step. A prox after the step is applied to the reading direction, by its adjoint. Of shards each
    process has its parts of all vectors.

    Args:
        snapshot: the step, before its update.
        mode: as in `plane_map`, like the following.
        root: of the rates.
        buffer_scale: of the momentum buffer.
        rest: of the steps before in the same window; None finds it.
        method: of the Hessian product.
        eigenvalue: of H, to which ``mode`` belongs: then there is no product; see `needs_product`.

    Raises:
        Unmeasurable: see `step_jacobian`; an optimizer without a formula.

    Cost: one Hessian product, or none; no gradient beside it.
    """
    parts = parts_of_vectors(snapshot)
    places, blocks = 1 if buffer_scale is None else 2, state_blocks(snapshot)
    names, others = (THETA, *blocks)[:places], blocks[places - 1 :]
    if eigenvalue is None:
        H = accurate_hessian(snapshot, method) if parts is None else hessian(snapshot, method=method, weight=root)
        change = _Scaled(1.0, clipped_change(snapshot, H @ (root * mode)))
    else:
        change = _Scaled(eigenvalue * root, mode)
    step = formula_tangent(snapshot)
    if rest is None:
        rest = _rest(step, others, {THETA: _Scaled(root, mode), GRADIENT: change}, parts) if others else mode[:0]
    scales = (root,) if buffer_scale is None else (root, buffer_scale)
    columns = [{name: _Scaled(scale, mode)} for name, scale in zip(names, scales)]
    reading = mode if parts is None else parts.once(mode)
    rows = [{name: _Scaled(scale, reading, inverse=True)} for name, scale in zip(names, scales)]
    if snapshot.run.prox is not None:
        rows[0] = {THETA: _Scaled(1.0, (proximal_jacobian(snapshot).T @ rows[0][THETA].product).to(mode))}
    if remembers := snapshot.run.ranks.any_true(bool(rest.any()), "what is remembered") if parts else bool(rest.any()):
        held = {name: _Scaled(1.0, part) for name, part in zip(others, rest.split(step.length))}
        readers = held if parts is None else {name: replace(h, base=parts.once(h.base)) for name, h in held.items()}
        columns, rows = [*columns, held], [*rows, readers]
    read = _Reader(step, parts)
    drift = read.entries(rows, columns)
    curvature = torch.zeros_like(drift)
    curvature[:, :1] = read.entries(rows, [{GRADIENT: change}])
    return PlaneStep(drift, curvature, rest, remembers)


def needs_product(snapshot: Snapshot) -> bool:
    """Return whether more of ``H v`` enters a step on the plane than its share along the eigenvector v itself.

    That is where the optimizer divides by second moments, where gradients are clipped, and before a prox.
    """
    rule = formula(snapshot.require_optimizer())
    is_plain = rule.second_moment is None and not rule.couples
    return not is_plain or snapshot.clipping is not None or snapshot.run.prox is not None


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A vector times a number, or times another vector, number by number: that product is made when it is read."""

    scale: Tensor | float
    base: Tensor
    inverse: bool = False

    @property
    def number(self) -> float:
        """The number."""
        if isinstance(self.scale, Tensor):
            return 1.0
        return 1 / self.scale if self.inverse else self.scale

    @property
    def vector(self) -> Tensor:
        """What the number multiplies."""
        if not isinstance(self.scale, Tensor):
            return self.base
        return (reciprocal(self.scale) if self.inverse else self.scale) * self.base

    @property
    def product(self) -> Tensor:
        """Both."""
        return self.vector if self.number == 1 else self.number * self.vector

    @property
    def key(self) -> int:
        """The same for equal vectors, as long as this exists."""
        return id(self if isinstance(self.scale, Tensor) else self.base)


def _rest(
    step: FormulaTangent, blocks: Sequence[str], along: Mapping[str, _Scaled], parts: VectorParts | None
) -> Tensor:
    """Return the direction in which blocks of the optimizer's state move along a change."""
    products = {name: part.product for name, part in along.items()}
    rest = next(iter(products.values())).new_zeros(len(blocks) * step.length)
    for name, part in zip(blocks, rest.split(step.length)):
        step.add_image(name, products, part)
    del products
    if parts is None:
        return unit(rest)
    size = math.hypot(*(float(total_norm(part, parts)) for part in rest.split(step.length)))
    return rest / size if size else rest


class _Reader:
    """Inner products through the derivative of a step, in float64; those of whole vectors are computed once."""

    def __init__(self, step: FormulaTangent, parts: VectorParts | None):
        self.step, self.parts = step, parts
        self.products: dict[tuple[int, int, int], float] = {}

    def entries(self, rows: Sequence[Mapping[str, _Scaled]], columns: Sequence[Mapping[str, _Scaled]]) -> Tensor:
        """Return ``<row, A column>`` of each pair, ``(rows, columns)``."""
        entries = torch.tensor([self._entries(row, columns) for row in rows], dtype=torch.float64)
        return entries if self.parts is None else self.parts.total(entries)

    def _entries(self, row: Mapping[str, _Scaled], columns: Sequence[Mapping[str, _Scaled]]) -> list[float]:
        readers = {block: reader.vector for block, reader in row.items()}
        return [self._entry(row, readers, column) for column in columns]

    def _entry(self, row: Mapping[str, _Scaled], readers: Mapping[str, Tensor], column: Mapping[str, _Scaled]) -> float:
        total, sources = 0.0, {name: source.vector for name, source in column.items()}
        for k, part in enumerate(self.step.parts):
            for block, reader in row.items():
                for name, derivative in part.derivatives.get(block, {}).items():
                    if name not in column:
                        continue
                    factor = reader.number * column[name].number
                    if isinstance(derivative, Tensor):
                        weighted = part.of(readers[block]) * derivative
                        total += factor * inner(weighted, part.of(sources[name]))
                        continue
                    key = (k, reader.key, column[name].key)
                    if key not in self.products:
                        self.products[key] = inner(part.of(readers[block]), part.of(sources[name]))
                    total += factor * derivative * self.products[key]
        return total
