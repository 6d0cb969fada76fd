"""A pass in which units near a kink are told apart, and have a derivative that can be moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.curvature.piecewise_linear import Pieces, pieces, pooled


@dataclass(frozen=True)
class Call:
    """One call of an activation.

    Attributes:
        z: its preactivations.
        change: a leaf of zeros in their shape, which stands for a change of its near-active values.
        near: which are near-active.
        radius: half of the jump of each slope.
        real: the slope at the input less the centre of both.
    """

    z: Tensor
    change: Tensor
    near: Tensor
    radius: Tensor
    real: Tensor


class Freed(TorchFunctionMode):
    """Replaces the derivative of every piecewise linear call that is made inside, see `operators.free_slopes`.

    Attributes:
        units: seen so far, near-active or not.
        calls: those with near-active units, in their order.
        fixed: kinks that were left as they are.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps, self.units = eps, 0
        self.calls: list[Call] = []
        self.fixed: set[str] = set()
        # What an activation returned: itself, its version, its input, how to call it.
        self._activated: dict[int, tuple[Tensor, int, Tensor, Any]] = {}

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
        self.calls.append(Call(z, change, near, radius.detach(), (real - centre).detach()))
        return slope * z + change


def _size(z: Tensor) -> Tensor:
    """Root mean square; 0 of nothing."""
    return (norm(z.detach()) / max(z.numel(), 1) ** 0.5).to(z.dtype)
