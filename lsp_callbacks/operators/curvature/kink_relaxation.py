"""The Jacobians of a network whose activations may take either slope where they are near a kink."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lsp_callbacks.autograd.graph import kinks_between, leaves_of
from lsp_callbacks.linalg import LinearOperator, lanczos, spectrum_bounds
from lsp_callbacks.operators.curvature.kink_mode import Freed
from lsp_callbacks.operators.sgd.sample_rows import Rows, check_adjoint, jacobian
from lsp_callbacks.step.snapshot import Unmeasurable

#: Probability with which the norm of a wide Jacobian may exceed what is taken for its bound, and steps of Lanczos.
FAILURE, STEPS = 1e-3, 30


@dataclass(frozen=True)
class FreeSlopes:
    """``J(e) = J + B E (I - T E)^-1 C``, E the diagonal of the k near-active units' slopes less their centres.

    Attributes:
        jacobian: J, ``(m, n)``, with the slopes of all near-active units at their centre.
        into: C, ``(k, n)``: the units' preactivations by the input.
        out: B, ``(m, k)``: the output by the units' values.
        between: T, ``(k, k)``, strictly lower triangular in the order of the calls: preactivations by earlier values.
        radius: ``(k,)``: half of the jump of each unit's slope; ``|e| <= radius``.
        real: ``(k,)``: e of the slopes that the network really has.
        layer: ``(k,)``: the number of the call that each unit belongs to.
        units: how many units there are in all.
        fixed: further kinks in the network, whose slopes were left as they are.
        centre: None, or an upper bound of ``||J||`` where J and C are restricted to a subspace of the inputs, which
            holds the rows of C: so ``||C||`` is whole, and ``||J(e)||`` bounded from below.
    """

    jacobian: Tensor
    into: Tensor
    out: Tensor
    between: Tensor
    radius: Tensor
    real: Tensor
    layer: Tensor
    units: int
    fixed: tuple[str, ...] = ()
    centre: Tensor | None = None


def free_slopes(
    forward: Callable[[Tensor], Tensor], x: Tensor, *, eps: float = 1e-3, most: int = 512
) -> list[FreeSlopes]:
    """Frees the slopes of all units of a piecewise linear activation that are near a kink.

    A unit is near-active if its preactivation (of a max-pooling window: its largest entry less the second) is within
    ``eps`` times the root mean square of that call's preactivations of a kink; its slope is then anything between those
    of the two sides. Freed are relu, leaky_relu, prelu, rrelu, relu6, hardtanh, clamp, abs, hardsigmoid and max-pooling
    with fixed windows, as modules or functions, wherever they stand in the network: the value of the call is kept, and
    its derivative replaced. Max-pooling of a monotone activation is taken before it, where fewer windows are tied. What
    is smooth (or a kink of another kind, which `FreeSlopes.fixed` names) is differentiated where it is.

    Args:
        forward: from samples to outputs, samples first and apart: in eval mode.
        x: the samples.
        eps: relative to the size of a call's preactivations; 0 takes those exactly at a kink.
        most: near-active units, and numbers of the shorter side of a Jacobian that is taken whole; see `FreeWay`.

    Returns:
        For each sample.

    Raises:
        Unmeasurable: if there are more than ``most`` near-active units.

    Cost: one forward pass, a backward pass for each near-active unit, and one for each number of a sample's output (or
    a forward product for each of its input, where they are fewer); less where both are above ``most``.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), Freed(eps) as freed:
        y = forward(x.clone())  # which may work in place on its input
    return FreeWay(freed, x, most=most).slopes(y)


class FreeWay:
    """The slopes freed on the way from an input to any state of one pass; what states share is taken once.

    Args:
        freed: the pass.
        x: the input, a leaf.
        axis: of its samples.
        most: near-active units that are taken.
    """

    def __init__(self, freed: Freed, x: Tensor, *, axis: int = 0, most: int = 512):
        self.freed, self.x, self.most = freed, x, most
        self.into = Rows(x, axis)
        self._known: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def slopes(self, y: Tensor, *, axis: int = 0, most: int | None = None) -> list[FreeSlopes]:
        """``dy / dx`` of each sample, with its free slopes.

        By a backward pass for each number of y or, where those of x are fewer, a forward product for each of x. If both
        are more than ``most``, J is taken on a subspace of the inputs, the rows of C and what Lanczos has met:
        ``||J(e)||`` is bounded from below, and ``||J||`` from above with probability 0.999: `linalg.spectrum_bounds`.

        Args:
            y: a state of the pass.
            axis: of its samples.
            most: numbers of the shorter side of a Jacobian that is taken whole; None is that of the units.

        Raises:
            Unmeasurable: if there are more near-active units before it than are taken.

        Cost: a backward pass for each near-active unit that no state before had, and one for each number; for the
        subspace 90 passes, and two for each near-active unit.
        """
        most = max(self.most if most is None else most, STEPS)
        reached = leaves_of(y)
        calls = [i for i, call in enumerate(self.freed.calls) if id(call.change) in reached]
        near = sum(int(self.freed.calls[i].near.sum()) for i in calls)
        if near > self.most:
            raise Unmeasurable(
                f"{near} near-active units take a backward pass each, more than most={self.most}: lower eps, take "
                "fewer samples, or raise most"
            )
        out, n = Rows(y, axis), self.into.length
        centre: Tensor | None = None
        with torch.enable_grad():
            units = [row for i in calls for row in self._of_call(i)]
            own = self._columns(calls)
            C, T = self._stacked([row[0] for row in units]), self._joined([row[1] for row in units])[:, own]
            if out.length <= min(most, n):
                rows = [self._row(out.flat(y)[:, i].sum(), calls) for i in range(out.length)]
                J, B = self._stacked([row[0] for row in rows]), self._joined([row[1] for row in rows])[:, own]
                B = B.expand(self.into.samples, -1, -1)
            else:
                A = jacobian(y, self.x, axes=(axis, self.into.axis))
                check_adjoint(A, y, "the network")
                V = torch.eye(n).to(C).expand(self.into.samples, -1, -1)
                if n > most:
                    V, centre = _subspace(A, C)
                J = torch.stack([A @ v for v in V.to(A.dtype).unbind(-1)], dim=-1).double()
                B, C = self._pushed(y, out, calls), C @ V
        calls_of = [torch.full((int(self.freed.calls[i].near.sum()),), i) for i in calls]
        radius, real = (
            torch.cat([getattr(self.freed.calls[i], name)[self.freed.calls[i].near] for i in calls] or [C.new_zeros(0)])
            for name in ("radius", "real")
        )
        fixed = kinks_between(y, [self.x, *(call.change for call in self.freed.calls)])
        return [
            _acting(
                FreeSlopes(
                    jacobian=J[i].cpu(),
                    into=C[i].cpu(),
                    out=B[i].cpu(),
                    # What lies above is zero, as a later unit changes no earlier one.
                    between=T.tril(-1).cpu(),
                    radius=radius.double().cpu(),
                    real=real.double().cpu(),
                    layer=torch.cat(calls_of) if calls_of else torch.zeros(0, dtype=torch.long),
                    units=self.freed.units // self.into.samples,
                    fixed=(*fixed, *sorted(self.freed.fixed)),
                    centre=None if centre is None else centre[i].cpu(),
                )
            )
            for i in range(self.into.samples)
        ]

    def _of_call(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """The rows of a call's near-active units."""
        if i not in self._known:
            call = self.freed.calls[i]
            self._known[i] = [self._row(one, range(i)) for one in call.z[call.near]]
        return self._known[i]

    def _row(self, one: Tensor, calls: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The derivatives of a number by the input and by all near-active units; of one number of each sample, too."""
        leaves = [self.x, *(self.freed.calls[i].change for i in calls)]
        parts: Iterable[Tensor | None] = [None] * len(leaves)
        if one.requires_grad:
            parts = torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True)
        first, *rest = parts
        by_unit = self.x.new_zeros(self._ends[-1])
        for i, part in zip(calls, rest):
            if part is not None:
                by_unit[self._ends[i] : self._ends[i + 1]] = part[self.freed.calls[i].near]
        return self.into.flat(torch.zeros_like(self.x) if first is None else first), by_unit

    def _pushed(self, y: Tensor, out: Rows, calls: list[int]) -> Tensor:
        """What a change of each near-active unit does to y, ``(samples, m, k)``."""
        leaves = [self.freed.calls[i].change for i in calls]
        columns = []
        if leaves:
            u = torch.zeros_like(y, requires_grad=True)
            back = torch.autograd.grad(y, leaves, u, create_graph=True)
            for i, pulled in zip(calls, back):
                for place in self.freed.calls[i].near.nonzero():
                    one = torch.zeros_like(pulled)
                    one[tuple(place)] = 1
                    columns.append(out.flat(torch.autograd.grad(pulled, u, one, retain_graph=True)[0]).double())
        return torch.stack(columns, dim=-1) if columns else y.new_zeros(out.samples, out.length, 0).double()

    @cached_property
    def _ends(self) -> list[int]:
        """Where the near-active units of each call begin among all, and how many there are."""
        return [0, *itertools.accumulate(int(call.near.sum()) for call in self.freed.calls)]

    def _columns(self, calls: list[int]) -> list[int]:
        return [k for i in calls for k in range(self._ends[i], self._ends[i + 1])]

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        """``(samples, rows, n)``."""
        empty = self.x.new_zeros(self.into.samples, 0, self.into.length)
        return (torch.stack(rows, dim=1) if rows else empty).double()

    def _joined(self, rows: list[Tensor]) -> Tensor:
        return (torch.stack(rows) if rows else self.x.new_zeros(0, self._ends[-1])).double()


def _subspace(A: LinearOperator, C: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows of C and of what Lanczos has met, ``(samples, n, q)``; a bound of ``||A||``."""
    samples, n = A.batch[0], A.shape[1]
    generator = torch.Generator(A.device).manual_seed(0)
    start = torch.randn(samples, n, dtype=A.dtype, device=A.device, generator=generator)
    found = lanczos(A.T @ A, start, steps=STEPS, tol=0.0, generator=generator)
    basis = torch.linalg.qr(torch.cat([C.mT, found.basis.permute(1, 2, 0).to(C)], dim=-1))[0]
    return basis, spectrum_bounds(found, failure=FAILURE)[1].clamp_min(0).sqrt()


def _acting(free: FreeSlopes) -> FreeSlopes:
    """Without units that the input does not reach, or that do not reach the output: those of other samples, too."""
    reached = free.into.abs().sum(1) > 0
    reaches = free.out.abs().sum(0) > 0
    for _ in range(int(free.layer.max()) + 1 if len(free.layer) else 0):  # through other units
        reached = reached | ((free.between != 0) & reached).any(1)
        reaches = reaches | ((free.between != 0) & reaches[:, None]).any(0)
    own = reached & reaches
    parts = {name: getattr(free, name)[own] for name in ("into", "radius", "real", "layer")}
    return replace(free, out=free.out[:, own], between=free.between[own][:, own], **parts)
