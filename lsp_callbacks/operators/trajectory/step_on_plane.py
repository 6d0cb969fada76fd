"""One optimizer step compressed onto the plane of its sharp mode, without vectors over the whole state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import inner, unit
from lsp_callbacks.operators.curvature.hessian import Method
from lsp_callbacks.operators.trajectory.formula_tangent import GRADIENT, THETA, FormulaTangent, formula_tangent
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_change, require_optimizer
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
    """

    drift: Tensor
    curvature: Tensor
    rest: Tensor

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
    depends on the step. A prox after the step is applied to the reading direction, by its adjoint.

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
    step = formula_tangent(snapshot)
    places = 1 if buffer_scale is None else 2
    names, others = (THETA, *step.blocks)[:places], step.blocks[places - 1 :]
    if eigenvalue is None:
        change = _Scaled(1.0, clipped_change(snapshot, accurate_hessian(snapshot, method) @ (root * mode)))
    else:
        change = _scaled(eigenvalue * root, mode)
    if rest is None:
        along = {THETA: root * mode, GRADIENT: change.product} if others else {}
        rest = unit(torch.cat([step.image(name, along) for name in others])) if others else mode[:0]
    scales = (root,) if buffer_scale is None else (root, buffer_scale)
    columns = [{name: _scaled(scale, mode)} for name, scale in zip(names, scales)]
    rows = [{name: _scaled(_inverse(scale), mode)} for name, scale in zip(names, scales)]
    if snapshot.run.prox is not None:
        rows[0] = {THETA: _Scaled(1.0, (proximal_jacobian(snapshot).T @ rows[0][THETA].product).to(mode))}
    if bool(rest.any()):
        held = {name: _Scaled(1.0, part) for name, part in zip(others, rest.split(step.length))}
        columns, rows = [*columns, held], [*rows, held]
    read = _Reader(step)
    drift = read.entries(rows, columns)
    curvature = torch.zeros_like(drift)
    curvature[:, :1] = read.entries(rows, [{GRADIENT: change}])
    return PlaneStep(drift, curvature, rest)


def needs_product(snapshot: Snapshot) -> bool:
    """Return whether more of ``H v`` enters a step on the plane than its share along the eigenvector v itself.

    That is where the optimizer divides by second moments, where gradients are clipped, and before a prox.
    """
    rule = formula(require_optimizer(snapshot))
    is_plain = rule.second_moment is None and not rule.couples
    return not is_plain or snapshot.clipping is not None or snapshot.run.prox is not None


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A vector times a number."""

    scale: float
    vector: Tensor

    @property
    def product(self) -> Tensor:
        return self.scale * self.vector


def _scaled(scale: Tensor | float, vector: Tensor) -> _Scaled:
    """Return a vector times a number, or number by number times another vector, which is multiplied at once."""
    return _Scaled(1.0, scale * vector) if isinstance(scale, Tensor) else _Scaled(scale, vector)


class _Reader:
    """Inner products through the derivative of a step, in float64; those of whole vectors are computed once."""

    def __init__(self, step: FormulaTangent):
        self.step = step
        self.known: dict[tuple[int, int, int], float] = {}

    def entries(self, rows: Sequence[Mapping[str, _Scaled]], columns: Sequence[Mapping[str, _Scaled]]) -> Tensor:
        """Return ``<row, A column>`` of each pair, ``(rows, columns)``."""
        return torch.tensor([[self._entry(row, column) for column in columns] for row in rows], dtype=torch.float64)

    def _entry(self, row: Mapping[str, _Scaled], column: Mapping[str, _Scaled]) -> float:
        total = 0.0
        for k, part in enumerate(self.step.parts):
            for block, reader in row.items():
                for name, derivative in part.derivatives.get(block, {}).items():
                    if name in column:
                        total += self._product(k, reader, derivative, column[name])
        return total

    def _product(self, k: int, reader: _Scaled, derivative: Tensor | float, source: _Scaled) -> float:
        of, factor = self.step.parts[k].of, reader.scale * source.scale
        if isinstance(derivative, Tensor):
            return factor * inner(of(reader.vector) * derivative, of(source.vector))
        key = (k, id(reader.vector), id(source.vector))
        if key not in self.known:
            self.known[key] = inner(of(reader.vector), of(source.vector))
        return factor * derivative * self.known[key]


def _inverse(root: Tensor | float) -> Tensor | float:
    return reciprocal(root) if isinstance(root, Tensor) else 1 / root
