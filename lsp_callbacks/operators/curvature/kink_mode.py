"""A forward pass in which the slopes of activations near a kink can be changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsp_callbacks.autograd._torch_internals import version
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.curvature.piecewise_linear import PiecewiseLinear, linear_pieces, pooling_windows


@dataclass(frozen=True)
class ActivationCall:
    """One call of an activation with near-active units.

    Attributes:
        z: its preactivations.
        change: a leaf of zeros in their shape, which represents a change of its near-active values.
        near: which units are near-active.
        radius: half of the jump of each slope.
        real: the slope at the input less the centre of both.
    """

    z: Tensor
    change: Tensor
    near: Tensor
    radius: Tensor
    real: Tensor


class KinkMode(TorchFunctionMode):
    """Replaces the derivative of every piecewise linear call that is made inside, see `relax_kinks`.

    Args:
        eps: how near to a kink units are relaxed, relative to the root mean square of the preactivations.

    Attributes:
        units: how many were seen so far, near-active or not.
        calls: those with near-active units, in their order.
        fixed: kinks that were left as they are.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps, self.units = eps, 0
        self.calls: list[ActivationCall] = []
        self.fixed: set[str] = set()
        # By the id of what an activation returned: the tensor, its version, the activation's input, how to call it.
        self._activated: dict[int, tuple[Tensor, int, Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return func(*args, **kwargs)
        z = args[0]
        windows = pooling_windows(func, z, args[1:], kwargs)
        if windows is not None:
            return self._pool(func, z, args[1:], kwargs)
        rule = linear_pieces(func, z, args[1:], kwargs)
        if rule is None:
            return func(*args, **kwargs)
        before = z.clone()
        result = self._apply(before, rule)
        if rule.in_place:
            z.copy_(result)
            result = z
        if rule.monotone:
            self._activated[id(result)] = (result, version(result), before, (func, args[1:], kwargs))
        return result

    def _pool(self, func: Any, a: Tensor, args: Any, kwargs: Any) -> Tensor:
        activation = self._activated.get(id(a))
        if activation is None or activation[0] is not a or activation[1] != version(a):
            return self._largest(func, a, args, kwargs)
        # max(f(z)) is f(max z): between equal zeros of a ReLU there would be nothing to choose.
        _, _, z, (activate, more, named) = activation
        top = self._largest(func, z, args, kwargs)
        rule = linear_pieces(activate, top, more, named)
        assert rule is not None
        return self._apply(top.clone(), rule)

    def _largest(self, func: Any, z: Tensor, args: Any, kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = func(z, *args, **kwargs)
        windows = pooling_windows(func, z, args, kwargs)
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

    def _apply(self, z: Tensor, rule: PiecewiseLinear) -> Tensor:
        linear = self._slope(z, rule.distance, rule.left, rule.right, rule.real, self.eps * _size(z))
        return rule.value + (linear - linear.detach())

    def _slope(self, z: Tensor, distance: Tensor, left: Tensor, right: Tensor, real: Tensor, gap: Tensor) -> Tensor:
        """Return ``slope * z``, with the slope at the centre where z is near its kink."""
        near = (distance <= gap).detach()
        self.units += z.numel()
        centre, radius = (left + right) / 2, (right - left).abs() / 2
        near = near & (radius > 0)
        slope = torch.where(near, centre, real).detach()
        if not bool(near.any()):
            return slope * z
        change = torch.zeros_like(z, requires_grad=True)
        self.calls.append(ActivationCall(z, change, near, radius.detach(), (real - centre).detach()))
        return slope * z + change


def _size(z: Tensor) -> Tensor:
    """Return the root mean square; 0 for an empty tensor."""
    return (norm(z.detach()) / max(z.numel(), 1) ** 0.5).to(z.dtype)
