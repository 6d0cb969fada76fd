"""Replays of a step in which activations keep the slopes that they have in the step, whatever moves the parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsp_callbacks.autograd._torch_internals import saves_elsewhere
from lsp_callbacks.autograd.graph import Graph, joined, read
from lsp_callbacks.operators.curvature.gradient_difference import Untrusted
from lsp_callbacks.step.replay_checks import check_loss
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: Elementwise functions of a single tensor that are linear on either side of their kinks.
_ELEMENTWISE = frozenset((
    "relu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid", "clamp", "clip", "clamp_min", "clamp_max", "abs",
))  # fmt: skip
_POOLS = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}
#: How many arguments come before ``inplace``, the tensor included.
_FLAGGED = {"relu": 1, "relu6": 1, "hardsigmoid": 1, "leaky_relu": 2, "hardtanh": 3}
#: Their backward nodes.
_NODES = re.compile(r"(Relu|LeakyRelu|Hardtanh|Hardsigmoid|Abs|Clamp|MaxPool)")


class KinksMoved(Untrusted):
    """A replay that calls other activations than the step did."""


@dataclass(frozen=True)
class Piece:
    """What one call of the step has told: where it lies between its kinks.

    Attributes:
        name: of the function.
        slope: of an elementwise function, number by number; for max-pooling which entries are the largest.
        offset: with which ``slope * z + offset`` is the value; None is 0.
    """

    name: str
    slope: Tensor
    offset: Tensor | None = None


class HeldSlopes(TorchFunctionMode):
    """Notes the pieces of a first replay; afterwards each call is the linear function of its piece.

    That function and its derivative are those of the step at the step's parameters, and smooth around them. A
    difference of its gradients crosses no kink: it is the second derivative almost everywhere, which two backward
    passes give as well.

    Args:
        replay: computes the loss.
    """

    def __init__(self, replay: Callable[[], Tensor]):
        super().__init__()
        self._replay = replay
        self._pieces: list[Piece] = []
        self._next: int | None = None  # None while pieces are noted
        self._inside = False

    def record(self) -> Tensor:
        """Return the loss at the step's parameters, with a graph in which no held kink is left."""
        self._pieces, self._next = [], None
        loss = self._run()
        self._next = 0
        return loss

    def replay(self) -> Tensor:
        """Return the loss at the parameters as they are.

        Raises:
            KinksMoved: where other functions are called than at the step's parameters.
        """
        self._next = 0
        loss = self._run()
        if self._next != len(self._pieces):
            raise KinksMoved("fewer activations are called than in the step")
        return loss

    def _run(self) -> Tensor:
        with self:
            self._inside = True
            try:
                return self._replay()
            finally:
                self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").removesuffix("_")
        if name not in _ELEMENTWISE and name not in _POOLS:
            return func(*args, **kwargs)
        z = args[0] if args else None
        if not self._inside or not isinstance(z, Tensor) or not (z.requires_grad and z.is_floating_point()):
            return func(*args, **kwargs)
        more = (*args[1:], *kwargs.values())
        if saves_elsewhere() or any(isinstance(value, Tensor) for value in more):
            return func(*args, **kwargs)  # its kink is seen in the graph; a checkpoint would call it again in backward
        if name in _POOLS:
            return self._pooled(name, z, args[1:], kwargs)
        takes = _FLAGGED.get(name, len(args))
        in_place = func.__name__.endswith("_") or bool(kwargs.pop("inplace", False)) or any(args[takes:])
        piece = self._piece(name, z) if self._next is not None else self._noted(func, name, z, args[1:takes], kwargs)
        if in_place:
            z.mul_(piece.slope)
            return z if piece.offset is None else z.add_(piece.offset)
        return z * piece.slope if piece.offset is None else torch.addcmul(piece.offset, z, piece.slope)

    def _noted(self, func: Any, name: str, z: Tensor, args: tuple, kwargs: dict[str, Any]) -> Piece:
        data = z.detach()
        if name == "relu":
            piece = Piece(name, (data > 0).to(data.dtype))
        else:
            with torch.enable_grad():
                leaf = data.clone().requires_grad_()
                value = func(leaf.clone(), *args, **kwargs)
                (slope,) = torch.autograd.grad(value.sum(), leaf)  # on the side that autograd takes
            piece = Piece(name, slope, value.detach() - slope * data)
        self._pieces.append(piece)
        return piece

    def _pooled(self, name: str, z: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        function = getattr(torch.nn.functional, name)
        named = (
            dict(zip(("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), args)) | kwargs
        )
        if named.pop("return_indices", False):
            return function(z, return_indices=True, **named)
        if self._next is None:
            _, places = function(z.detach(), return_indices=True, **named)
            self._pieces.append(Piece(name, places))
        else:
            places = self._piece(name, z).slope
        dims = _POOLS[name]
        return z.flatten(-dims).gather(-1, places.flatten(-dims)).view(places.shape)

    def _piece(self, name: str, z: Tensor) -> Piece:
        """Return the piece of the next call."""
        assert self._next is not None
        if self._next >= len(self._pieces) or self._pieces[self._next].name != name:
            raise KinksMoved("other activations are called than in the step")
        piece = self._pieces[self._next]
        if name in _ELEMENTWISE and piece.slope.shape != z.shape:
            raise KinksMoved("activations have another shape than in the step")
        self._next += 1
        return piece


def holds_kinks(graph: Graph) -> bool:
    """Return whether all kinks of a graph look like those that can be held; a custom function may have others."""
    return not graph.kinks or (not graph.custom and all(_NODES.match(name) for name in graph.kinks))


@computed_once
def with_held_slopes(snapshot: Snapshot) -> Snapshot | None:
    """Return the step with a replay in which slopes are held; None where a kink is left.

    Raises:
        Unmeasurable: if the replayed loss is not the step's.

    Cost: one forward pass.
    """
    held = HeldSlopes(snapshot.replay)
    losses: list[Tensor] = []

    def rank_graph() -> Graph:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            loss = held.record()
        check_loss(snapshot, loss, tolerance=1e-10 if loss.dtype == torch.float64 else 1e-5)
        losses.append(loss.detach())
        return read(loss)

    if joined(snapshot.run.ranks.gather(rank_graph, "the replay with held slopes")).kinked:
        return None
    return replace(snapshot, replay=held.replay, loss=losses[0])
