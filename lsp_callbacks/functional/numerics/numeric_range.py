"""How far a step's numbers are from the ends of their own precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import tree_map, works_in_place
from lsp_callbacks.autograd.op_mode import Operation, Operations, floats
from lsp_callbacks.errors import Unmeasurable

_Peaks = dict[tuple[str, torch.dtype, torch.device], Tensor]
#: They compute nothing.
_COPIES = ("aten.clone", "aten.detach", "aten.copy", "aten.lift_fresh", "aten.empty", "aten.new_empty", "aten.resize")
#: What puts masks where numbers were.
_FILLS = ("aten.masked_fill", "aten.where", "aten.fill", "aten.full", "aten.scatter", "aten.index_put")
#: What is so much smaller than the largest number of its tensor may be the rounding of a zero in float64.
NOISE = 1e-13


@dataclass(frozen=True)
class NumericRange:
    """Distance of the numbers of one step from the ends of their types.

    Attributes:
        activations: head-room in bits by module, over all that its operations compute in the forward pass.
        gradients: likewise in the backward pass.
        weights: by parameter.
        small: numbers that the backward pass computes and that are below the smallest normal number of their type.
        nonzero: numbers that it computes and that are not exactly zero.
    """

    activations: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    small: int = 0
    nonzero: int = 0

    @property
    def underflow(self) -> float:
        """Return the share of the small ones; NaN where nothing was compared."""
        return self.small / self.nonzero if self.nonzero else math.nan


def headroom(largest: float, dtype: torch.dtype) -> float:
    """Return the bits to overflow, ``log2(max / largest)``: how often the largest number may be doubled.

    It is always finite: zero has as much of it as the smallest number of the type, Inf and NaN have none.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import headroom
        >>> headroom(65504 / 8, torch.float16), headroom(float("inf"), torch.float16)
        (3.0, 0.0)
    """
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps  # the smallest that is not zero
    return max(0.0, math.log2(limits.max) - math.log2(max(largest, least))) if largest == largest else 0.0


def numeric_range(
    loss: Callable[[], Tensor],
    module: nn.Module,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    check: Callable[[Tensor], None] | None = None,
) -> NumericRange:
    """Return head-room and underflow of one step, in the types in which it computes, under autocast too.

    One forward and one backward pass; every operation is looked at. Head-room is taken of its largest finite number:
    Inf and the very largest number of a type are masks. Underflow: where an operation of the backward pass gave zeros
    or subnormal numbers, it is computed again in float64 *from the same inputs*, and ``0 < |exact| < smallest normal``
    is counted; exact numbers below 1e-13 of the largest in their tensor count as zero, so that of the wide
    types (bfloat16, float32) whole tensors must be near the end. Operations that draw random numbers, work in place or
    have no kernel for float64 are left out of that count.

    Args:
        loss: one forward pass, which leaves the parameters alone.
        module: whose submodules and parameters give the names. It carries hooks for the time of the call.
        parameters: those whose gradients are taken, by name; None takes all of the module that require one.
        scale: by which the gradient of the loss is multiplied, as a gradient scaler does.
        check: is given the loss before the backward pass, and raises where it is not what it should be.

    Raises:
        Unmeasurable: where there is no such parameter.

    Cost: one gradient, with the looks and what is computed again in float64 3 to 5 (measured on a CPU), far more in the
    time of small networks.

    Source: Micikevicius et al. 2018, Sec. 3.2, for the share of gradients below the range.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import numeric_range
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 2.0**100)
        >>> result = numeric_range(lambda: net(torch.ones(1, 1)).sum(), net)
        >>> {name: round(bits, 3) for name, bits in result.weights.items()}  # float32 ends just below 2^128
        {'weight': 28.0}
    """
    looked = _Ends(module)
    if parameters is None:
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise Unmeasurable("no parameter requires a gradient: there is no backward pass to look at, unfreeze some")
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        with looked.watching():
            value = loss()
        if check is not None:
            check(value)
        scales = torch.full_like(value, scale)
        with looked.watching():
            torch.autograd.grad(value, list(parameters.values()), scales, allow_unused=True)
    small, nonzero = (sum(int(pair[i]) for pair in looked.counts) for i in (0, 1))
    return NumericRange(
        activations=_least(looked.peaks[0]),
        gradients=_least(looked.peaks[1]),
        weights={name: headroom(float(peak(p)), p.dtype) for name, p in parameters.items() if p.numel()},
        small=small,
        nonzero=nonzero,
    )


class _Ends(Operations):
    """Remembers the largest number of each module and type, and counts small ones; reads nothing from the device."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        #: Of the forward and of the backward pass.
        self.peaks: tuple[_Peaks, _Peaks] = ({}, {})
        self.counts: list[tuple[Tensor | int, Tensor | int]] = []

    def run(self, operation: Operation, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func.is_view or operation.name.startswith(_COPIES):
            return out
        with torch.no_grad():
            filled = operation.name.startswith(_FILLS)
            made = False if filled or operation.node is not None else _made(floats((args, kwargs)))
            for tensor in floats(out) + (floats((args, kwargs)) if works_in_place(func) else []):
                peaks = self.peaks[operation.node is not None]
                key = (operation.module, tensor.dtype, tensor.device)
                # Masks are of the forward pass.
                now = peak(tensor, None if operation.node is not None else made)
                peaks[key] = torch.maximum(peaks[key], now) if key in peaks else now
            random = torch.Tag.nondeterministic_seeded in func.tags
            if operation.node is not None and not works_in_place(func) and not random:
                self._count(floats(out), func, args, kwargs)
        return out

    def _count(self, results: list[Tensor], func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not results:
            return
        if not any(bool((t.abs() < torch.finfo(t.dtype).tiny).any()) for t in results):
            self.counts.append((0, sum(t.numel() for t in results)))
            return
        try:
            exact = floats(func(*tree_map(_wide, args), **tree_map(_wide, kwargs)))
        except (RuntimeError, TypeError):  # no such kernel
            return
        for t, e in zip(results, exact):
            size = e.abs()
            there = size > NOISE * size.amax()
            self.counts.append(((there & (size < torch.finfo(t.dtype).tiny)).sum(), there.sum()))


def peak(tensor: Tensor, overflown: Tensor | bool | None = None) -> Tensor:
    """Return the largest absolute number that is not at the end of its type, as masks are.

    Args:
        tensor: of any floating-point type.
        overflown: where nothing else is left in the tensor, whether that is no mask: then Inf. None takes any Inf or
            NaN for an overflow.
    """
    t = tensor.detach()
    t = torch.view_as_real(t) if t.is_complex() else t
    t = t.float() if t.element_size() < 2 else t
    size = t.abs()
    inside = size < torch.finfo(tensor.dtype).max
    lost = ~size.isfinite().all() if overflown is None else ~inside.any() & overflown
    return torch.where(lost, torch.inf, torch.where(inside, size, 0.0).amax())


def _made(inputs: list[Tensor]) -> Tensor | bool:
    """Return whether an operation had anything finite to make Inf of; what fills a tensor had not."""
    return torch.stack([t.isfinite().any() for t in inputs]).any() if inputs else False


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _least(peaks: _Peaks) -> dict[str, float]:
    """Return the head-room of each module, the least over the types that it computes in."""
    least: dict[str, float] = {}
    for (module, dtype, _), largest in peaks.items():
        least[module] = min(headroom(float(largest), dtype), least.get(module, math.inf))
    return least


def lost_share(before: Tensor, exact: Tensor) -> tuple[int, int]:
    """Return how many parameters a rounded update leaves where they were, and how many it should move.

    ``theta + d == theta`` in the type of theta, d not zero.

    Args:
        before: parameters, in their own type.
        exact: the parameters after the update, in float64.

    Returns:
        Those, and all that the exact update moves.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import lost_share
        >>> before = torch.ones(3, dtype=torch.bfloat16)  # its next number is 1 + 2^-7
        >>> lost_share(before, before.double() + torch.tensor([2**-9, 2**-7, 0.0], dtype=torch.float64))
        (1, 2)
    """
    moves = exact != before.double()
    return int((moves & (exact.to(before.dtype) == before)).sum()), int(moves.sum())
