"""The Jacobians of a network whose activations may take either slope where they are near a kink."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import check_adjoint, jacobian
from lsp_callbacks.autograd.graph import kinks_between, leaves_of, read
from lsp_callbacks.autograd.sample_rows import Rows
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.clarke import RelaxedJacobian
from lsp_callbacks.linalg import LinearOperator, lanczos, spectrum_bounds
from lsp_callbacks.operators.curvature.kink_mode import KinkMode

#: Probability with which the norm of a wide Jacobian may exceed its bound, and steps of Lanczos.
FAILURE, STEPS = 1e-3, 30


def relax_kinks(
    forward: Callable[[Tensor], Tensor], x: Tensor, *, eps: float = 1e-3, most: int = 512
) -> list[RelaxedJacobian]:
    """Return the Jacobian at each sample as a function of the slopes of all units near a kink.

    A unit is near-active if its preactivation (of a max-pooling window: its largest entry less the second) is within
    ``eps`` times the root mean square of that call's preactivations of a kink; its slope is then anything between those
    of the two sides. The slopes of relu, leaky_relu, prelu, rrelu, relu6, hardtanh, clamp, abs, hardsigmoid and
    max-pooling with fixed windows are relaxed, as modules or functions, anywhere in the network: the value of the call
    is kept, and its derivative replaced. Max-pooling of a monotone activation is exchanged with it, so that fewer
    windows are tied. Smooth functions, and other kinks (which `RelaxedJacobian.fixed` names), are differentiated where
    they are.

    Args:
        forward: from samples to outputs, samples first and independent: in eval mode.
        x: the samples.
        eps: relative to the size of a call's preactivations; 0 relaxes those exactly at a kink.
        most: near-active units, and numbers of the shorter side of a Jacobian that is computed whole.

    Returns:
        One for each sample.

    Raises:
        Unmeasurable: if there are more than ``most`` near-active units.

    Cost: one forward pass, a backward pass for each near-active unit, and one for each number of a sample's output (or
    a forward product for each of its input, where they are fewer); less where both are above ``most``.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), KinkMode(eps) as mode:
        y = forward(x.clone())  # which may work in place on its input
    return KinkRelaxation(mode, x, most=most).slopes(y)


class KinkRelaxation:
    """The relaxed Jacobians from an input to any state of one pass; what states share is computed once.

    Args:
        mode: the pass.
        x: the input, a leaf.
        axis: the axis of its samples.
        most: how many near-active units are allowed.
    """

    def __init__(self, mode: KinkMode, x: Tensor, *, axis: int = 0, most: int = 512):
        self.mode, self.x, self.most = mode, x, most
        self.into = Rows(x, axis)
        self._rows_of: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def slopes(self, y: Tensor, *, axis: int = 0, most: int | None = None) -> list[RelaxedJacobian]:
        """Return ``dy / dx`` of each sample, as a function of the relaxed slopes.

        By a backward pass for each number of y or, where those of x are fewer, a forward product for each of x. If both
        are more than ``most``, J is computed on a subspace of the inputs, the rows of C and the vectors of a Lanczos
        run: ``||J(e)||`` is bounded from below, and ``||J||`` from above with probability 0.999, by
        `linalg.spectrum_bounds`.

        Args:
            y: a state of the pass.
            axis: the axis of its samples.
            most: numbers of the shorter side of a Jacobian that is computed whole; None is the limit of the units.

        Raises:
            Unmeasurable: if there are more near-active units before it than are allowed.

        Cost: a backward pass for each near-active unit that no state before had, and one for each number; for the
        subspace 90 passes, one for each call and two for each near-active unit.
        """
        most = max(self.most if most is None else most, STEPS)
        reached = leaves_of(y)
        calls = [i for i, call in enumerate(self.mode.calls) if id(call.change) in reached]
        near = sum(int(self.mode.calls[i].near.sum()) for i in calls)
        if near > self.most:
            raise Unmeasurable(
                f"{near} near-active units need a backward pass each, more than most={self.most}: lower eps, take "
                "fewer samples, or raise most"
            )
        out, n = Rows(y, axis), self.into.length
        centre: Tensor | None = None
        with torch.enable_grad():
            units = [row for i in calls for row in self._of_call(i)]
            columns = self._columns(calls)
            C, T = self._stacked([row[0] for row in units]), self._joined([row[1] for row in units])[:, columns]
            if out.length <= min(most, n):
                rows = [self._row(out.flat(y)[:, i].sum(), calls) for i in range(out.length)]
                J, B = self._stacked([row[0] for row in rows]), self._joined([row[1] for row in rows])[:, columns]
                B = B.expand(self.into.samples, -1, -1)
            else:
                A = jacobian(y, self.x, axes=(axis, self.into.axis))
                check_adjoint(A, read(y), "the network")
                V = torch.eye(n).to(C).expand(self.into.samples, -1, -1)
                if n > most:
                    V, centre = _subspace(A, C)
                J = torch.stack([A @ v for v in V.to(A.dtype).unbind(-1)], dim=-1).double()
                B, C = self._pushed(y, out, calls), C @ V
        calls_of = [torch.full((int(self.mode.calls[i].near.sum()),), i) for i in calls]
        radius, real = (
            torch.cat([getattr(self.mode.calls[i], name)[self.mode.calls[i].near] for i in calls] or [C.new_zeros(0)])
            for name in ("radius", "real")
        )
        fixed = kinks_between(y, [self.x, *(call.change for call in self.mode.calls)])
        return [
            _effective(
                RelaxedJacobian(
                    jacobian=J[i].cpu(),
                    into=C[i].cpu(),
                    out=B[i].cpu(),
                    # What lies above is zero, as a later unit changes no earlier one.
                    between=T.tril(-1).cpu(),
                    radius=radius.double().cpu(),
                    real=real.double().cpu(),
                    layer=torch.cat(calls_of) if calls_of else torch.zeros(0, dtype=torch.long),
                    units=self.mode.units // self.into.samples,
                    fixed=(*fixed, *sorted(self.mode.fixed)),
                    centre=None if centre is None else centre[i].cpu(),
                )
            )
            for i in range(self.into.samples)
        ]

    def _of_call(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """Return the rows of a call's near-active units."""
        if i not in self._rows_of:
            call = self.mode.calls[i]
            self._rows_of[i] = [self._row(number, range(i)) for number in call.z[call.near]]
        return self._rows_of[i]

    def _row(self, number: Tensor, calls: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return the derivatives of a number, or of a sum over samples, by the input and by all near-active units."""
        leaves = [self.x, *(self.mode.calls[i].change for i in calls)]
        parts: Iterable[Tensor | None] = [None] * len(leaves)
        if number.requires_grad:
            parts = torch.autograd.grad(number, leaves, retain_graph=True, allow_unused=True)
        first, *rest = parts
        by_unit = self.x.new_zeros(self._ends[-1])
        for i, part in zip(calls, rest):
            if part is not None:
                by_unit[self._ends[i] : self._ends[i + 1]] = part[self.mode.calls[i].near]
        return self.into.flat(torch.zeros_like(self.x) if first is None else first), by_unit

    def _pushed(self, y: Tensor, out: Rows, calls: list[int]) -> Tensor:
        """Return the derivative of y by each near-active unit, ``(samples, m, k)``."""
        columns = []
        for call in (self.mode.calls[i] for i in calls):
            J = jacobian(y, call.change)
            for place in call.near.flatten().nonzero()[:, 0].tolist():
                unit = torch.zeros(J.shape[1], dtype=J.dtype, device=J.device)
                unit[place] = 1
                columns.append(out.flat((J @ unit).view_as(y)).double())
        return torch.stack(columns, dim=-1) if columns else y.new_zeros(out.samples, out.length, 0).double()

    @cached_property
    def _ends(self) -> list[int]:
        """Return where the near-active units of each call begin among all, and how many there are."""
        return [0, *itertools.accumulate(int(call.near.sum()) for call in self.mode.calls)]

    def _columns(self, calls: list[int]) -> list[int]:
        return [k for i in calls for k in range(self._ends[i], self._ends[i + 1])]

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        """Return ``(samples, rows, n)``."""
        empty = self.x.new_zeros(self.into.samples, 0, self.into.length)
        return (torch.stack(rows, dim=1) if rows else empty).double()

    def _joined(self, rows: list[Tensor]) -> Tensor:
        return (torch.stack(rows) if rows else self.x.new_zeros(0, self._ends[-1])).double()


def _subspace(A: LinearOperator, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis of the rows of C and of Lanczos vectors, ``(samples, n, q)``, and an upper bound of ``||A||``."""
    samples, n = A.batch[0], A.shape[1]
    generator = torch.Generator(A.device).manual_seed(0)
    start = torch.randn(samples, n, dtype=A.dtype, device=A.device, generator=generator)
    ritz = lanczos(A.T @ A, start, steps=STEPS, tol=0.0, generator=generator)
    basis = torch.linalg.qr(torch.cat([C.mT, ritz.basis.permute(1, 2, 0).to(C)], dim=-1))[0]
    return basis, spectrum_bounds(ritz, failure=FAILURE)[1].clamp_min(0).sqrt()


def _effective(relaxed: RelaxedJacobian) -> RelaxedJacobian:
    """Drop units that the input does not reach, or that do not reach the output, such as those of other samples."""
    reached = relaxed.into.abs().sum(1) > 0
    reaches = relaxed.out.abs().sum(0) > 0
    for _ in range(int(relaxed.layer.max()) + 1 if len(relaxed.layer) else 0):  # through other units
        reached = reached | ((relaxed.between != 0) & reached).any(1)
        reaches = reaches | ((relaxed.between != 0) & reaches[:, None]).any(0)
    kept = reached & reaches
    parts = {name: getattr(relaxed, name)[kept] for name in ("into", "radius", "real", "layer")}
    return replace(relaxed, out=relaxed.out[:, kept], between=relaxed.between[kept][:, kept], **parts)
