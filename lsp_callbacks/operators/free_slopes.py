"""The Jacobian of a network whose activations may take either slope where they are near a kink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsp_callbacks.graph import kinks_between
from lsp_callbacks.operators.pieces import Pieces, pieces, pooled
from lsp_callbacks.snapshot import Unmeasurable


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


@dataclass(frozen=True)
class _Call:
    """One call of an activation: its preactivations, and a zero that stands for a change of its near-active values."""

    z: Tensor
    change: Tensor
    near: Tensor
    radius: Tensor
    real: Tensor


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
        most: rows of derivatives, one for each number of the outputs and each near-active unit.

    Returns:
        For each sample.

    Raises:
        Unmeasurable: if there are more than ``most`` rows.

    Cost: one forward pass, and a backward pass for each row.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), Freed(eps) as freed:
        y = forward(x.clone())  # which may work in place on its input
    return freed.slopes(y, x, most=most)


class Freed(TorchFunctionMode):
    """Replaces the derivative of every piecewise linear call that is made inside, see `free_slopes`."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps, self.units = eps, 0
        self.calls: list[_Call] = []
        self.fixed: set[str] = set()
        # What an activation returned: itself, its version, its input, how to call it.
        self._activated: dict[int, tuple[Tensor, int, Tensor, Any]] = {}

    def slopes(self, y: Tensor, x: Tensor, *, most: int, axes: tuple[int, int] = (0, 0)) -> list[FreeSlopes]:
        """What was freed on the way from x to y, sample by sample.

        Args:
            y: output, and
            x: input, a leaf.
            most: rows, see `free_slopes`.
            axes: of the samples in both.
        """
        fixed = (*kinks_between(y, [x, *(call.change for call in self.calls)]), *sorted(self.fixed))
        near = sum(int(call.near.sum()) for call in self.calls)
        if y.numel() + near > most:
            raise Unmeasurable(
                f"{y.numel()} numbers in the outputs and {near} near-active units take a backward pass each, more than "
                f"most={most}: lower eps, take fewer samples, or raise most"
            )
        with torch.enable_grad():
            return self._slopes(y, x, axes, fixed)

    def _slopes(self, y: Tensor, x: Tensor, axes: tuple[int, int], fixed: tuple[str, ...]) -> list[FreeSlopes]:
        leaves = [x, *(call.change for call in self.calls)]
        outputs = y.movedim(axes[0], 0).flatten(1) if y.ndim > 1 else y[:, None]
        samples, m = outputs.shape
        rows = [self._row(one, leaves) for one in outputs.flatten()]
        rows += [self._row(one, leaves) for call in self.calls for one in call.z[call.near]]
        by_input = torch.stack([row[0].movedim(axes[1], 0).reshape(samples, -1).double() for row in rows], dim=1)
        by_unit = torch.stack([row[1].double() for row in rows])
        joined = {
            name: torch.cat([getattr(call, name)[call.near] for call in self.calls] or [x.new_zeros(0)]).double()
            for name in ("radius", "real")
        }
        numbers = [torch.full((int(call.near.sum()),), i) for i, call in enumerate(self.calls)]
        top = samples * m
        return [
            _acting(
                FreeSlopes(
                    jacobian=own[i * m : (i + 1) * m].cpu(),
                    into=own[top:].cpu(),
                    out=by_unit[i * m : (i + 1) * m].cpu(),
                    # What lies above is zero, as a later unit changes no earlier one.
                    between=by_unit[top:].tril(-1).cpu(),
                    layer=torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long),
                    units=self.units // samples,
                    fixed=fixed,
                    **{name: values.cpu() for name, values in joined.items()},
                )
            )
            for i, own in enumerate(by_input)
        ]

    def _row(self, one: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        parts = [torch.zeros_like(leaf) for leaf in leaves]
        if one.requires_grad:
            parts = list(torch.autograd.grad(one, leaves, retain_graph=True, materialize_grads=True))
        changes = [part[call.near] for part, call in zip(parts[1:], self.calls)]
        return parts[0], torch.cat(changes or [one.new_zeros(0)])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return func(*args, **kwargs)
        z = args[0]
        windows = pooled(func, z, args[1:], kwargs)
        if windows is not None:
            return self._pool(func, z, args[1:], kwargs)
        rule = pieces(func, z, args[1:], kwargs)
        if rule is None:
            return func(*args, **kwargs)
        before = z.clone()
        result = self._apply(before, rule)
        if rule.in_place:
            z.copy_(result)
            result = z
        if rule.monotone:
            self._activated[id(result)] = (result, result._version, before, (func, args[1:], kwargs))
        return result

    def _pool(self, func: Any, a: Tensor, args: Any, kwargs: Any) -> Tensor:
        known = self._activated.get(id(a))
        if known is None or known[0] is not a or known[1] != a._version:
            return self._windows(func, a, args, kwargs)
        # max(f(z)) is f(max z): between equal zeros of a ReLU there would be nothing to choose.
        _, _, z, (activation, more, named) = known
        top = self._windows(func, z, args, kwargs)
        rule = pieces(activation, top, more, named)
        assert rule is not None
        return self._apply(top.clone(), rule)

    def _windows(self, func: Any, z: Tensor, args: Any, kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = func(z, *args, **kwargs)
        windows = pooled(func, z, args, kwargs)
        assert windows is not None
        largest = windows.detach().topk(min(3, windows.shape[-1]), dim=-1).indices
        top, second, *third = windows.gather(-1, largest).unbind(-1)
        gap = self.eps * _size(value)
        if third and bool((top - third[0] <= gap).any()):
            self.fixed.add("max-pooling tied three ways")
        # max(a, b) = (a + b) / 2 + |a - b| / 2, a the larger one.
        difference = top - second
        sides = difference.new_ones(()).expand_as(difference)
        half = self._slope(difference, difference.abs(), -sides, sides, sides, gap)
        linear = (top + second + half) / 2
        return value + (linear - linear.detach())

    def _apply(self, z: Tensor, rule: Pieces) -> Tensor:
        linear = self._slope(z, rule.distance, rule.left, rule.right, rule.real, self.eps * _size(z))
        return rule.value + (linear - linear.detach())

    def _slope(self, z: Tensor, distance: Tensor, left: Tensor, right: Tensor, real: Tensor, gap: Tensor) -> Tensor:
        """``slope * z``, with the slope at the centre where z is near its kink."""
        near = (distance <= gap).detach()
        self.units += z.numel()
        centre, radius = (left + right) / 2, (right - left).abs() / 2
        near = near & (radius > 0)
        slope = torch.where(near, centre, real).detach()
        if not bool(near.any()):
            return slope * z
        change = torch.zeros_like(z, requires_grad=True)
        self.calls.append(_Call(z, change, near, radius.detach(), (real - centre).detach()))
        return slope * z + change


def _size(z: Tensor) -> Tensor:
    """Root mean square; 0 of nothing."""
    return z.detach().square().mean().sqrt() if z.numel() else z.new_zeros(())


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
