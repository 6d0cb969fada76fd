"""Piecewise linear functions: where their kinks are, and the slopes on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Where the kink is, the slope below it, the slope above.
Kink = tuple[float, float | Tensor, float]


@dataclass(frozen=True)
class PiecewiseLinear:
    """One call of an elementwise piecewise linear function, number by number.

    Attributes:
        value: what the call returns, without a graph.
        distance: to the nearest kink.
        left: the slope below that kink.
        right: the slope above it.
        real: the slope at the input; at a kink the one below.
        monotone: whether no slope is negative.
        in_place: whether the call overwrites its input.
    """

    value: Tensor
    distance: Tensor
    left: Tensor
    right: Tensor
    real: Tensor
    monotone: bool
    in_place: bool


def _clamp(low: Any = None, high: Any = None) -> list[Kink] | None:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    bounds: list[Kink] = [] if low is None else [(float(low), 0.0, 1.0)]
    return bounds + ([] if high is None else [(float(high), 1.0, 0.0)])


def _rrelu(lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> list[Kink] | None:
    return None if training else [(0.0, (lower + upper) / 2, 1.0)]


#: From a call's arguments after the first to its kinks, ascending; None where they are unknown.
_RULES: dict[str, Callable[..., list[Kink] | None]] = {
    "relu": lambda: [(0.0, 0.0, 1.0)],
    "relu6": lambda: _clamp(0.0, 6.0),
    "leaky_relu": lambda negative_slope=0.01: [(0.0, negative_slope, 1.0)],
    "rrelu": _rrelu,
    "prelu": lambda weight: [(0.0, weight, 1.0)],
    "hardtanh": lambda min_val=-1.0, max_val=1.0: _clamp(min_val, max_val),
    "clamp": lambda min=None, max=None: _clamp(min, max),
    "clip": lambda min=None, max=None: _clamp(min, max),
    "clamp_min": lambda min: _clamp(min),
    "clamp_max": lambda max: _clamp(None, max),
    "abs": lambda: [(0.0, -1.0, 1.0)],
    "hardsigmoid": lambda: [(-3.0, 0.0, 1 / 6), (3.0, 1 / 6, 0.0)],
}
#: How many further arguments come before ``inplace``.
_FLAGGED = {"relu": 0, "relu6": 0, "hardsigmoid": 0, "leaky_relu": 1, "hardtanh": 2, "rrelu": 3}


def linear_pieces(func: Any, z: Tensor, args: tuple, kwargs: dict[str, Any]) -> PiecewiseLinear | None:
    """Return the pieces of ``func(z, *args, **kwargs)``; None if it is another function, or its kinks are unknown."""
    name = getattr(func, "__name__", "")
    rule = _RULES.get(name.removesuffix("_"))
    if rule is None or not z.is_floating_point():
        return None
    named = {key: value for key, value in kwargs.items() if key != "inplace"}
    takes = _FLAGGED.get(name, len(args))
    in_place = name.endswith("_") or bool(kwargs.get("inplace")) or any(args[takes:])
    args = args[:takes]
    kinks = rule(*args, **named)
    if not kinks:
        return None
    with torch.no_grad():
        data = z.detach()
        value = func(data.clone(), *args, **named)
        places = torch.stack([(data - place).abs() for place, _, _ in kinks])
        nearest = places.argmin(0)
        left = torch.stack([_spread(slope, data) for _, slope, _ in kinks])
        right = torch.stack([_spread(slope, data) for _, _, slope in kinks])
        real = left[0]
        for (place, _, _), slope in zip(kinks, right):
            real = torch.where(data > place, slope, real)
        below, above = (slopes.gather(0, nearest[None])[0] for slopes in (left, right))
        monotone = bool((left >= 0).all() and (right >= 0).all())
    return PiecewiseLinear(value, places.amin(0), below, above, real, monotone, in_place)


def _spread(slope: float | Tensor, z: Tensor) -> Tensor:
    if isinstance(slope, Tensor):  # of each channel, on axis 1
        slope = slope.detach().reshape(-1, *[1] * max(z.ndim - 2, 0)) if slope.numel() > 1 else slope.detach()
        return slope.expand_as(z)
    return torch.full_like(z, slope)


_POOLS = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}


def pooling_windows(func: Any, z: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the windows of a max-pooling, ``(..., entries)``, with their graph; None for any other function."""
    dims = _POOLS.get(getattr(func, "__name__", ""))
    if dims is None or z.ndim <= dims:
        return None
    given = dict(zip(("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), args)) | kwargs
    if given.get("ceil_mode") or given.get("return_indices"):
        return None
    size = _each(given["kernel_size"], dims)
    stride = _each(given.get("stride") or size, dims)
    padding, gaps = _each(given.get("padding", 0), dims), _each(given.get("dilation", 1), dims)
    if math.prod(size) == 1:
        return None
    around = [n for n in reversed(padding) for _ in range(2)]
    windows = F.pad(z, around, value=torch.finfo(z.dtype).min / 4)
    for axis, (entries, step, gap) in enumerate(zip(size, stride, gaps)):
        windows = windows.unfold(z.ndim - dims + axis, gap * (entries - 1) + 1, step)[..., ::gap]
    return windows.flatten(-dims)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value
