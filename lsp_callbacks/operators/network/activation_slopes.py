"""The slopes of all activations of one forward pass, whether they are modules or functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import metadata, saved
from lsp_callbacks.autograd.graph import walk
from lsp_callbacks.autograd.module_calls import ModuleCall, leaves, upstream
from lsp_callbacks.functional.network.activations import GELU_TANH, MISH, SILU


def _elu(node: Any) -> float:
    scale, alpha = saved["scale"](node), saved["alpha"](node)
    return max(abs(float(scale)), abs(float(alpha * scale * saved["input_scale"](node))))


#: ``sup |phi'|`` from the backward node of an elementwise activation; None where phi may jump.
NODES: dict[str, Callable[[Any], float | None]] = {
    "CeluBackward": lambda node: 1.0,
    "EluBackward": _elu,
    "GeluBackward": lambda node: GELU_TANH,
    "HardsigmoidBackward": lambda node: 1 / 6,
    "HardswishBackward": lambda node: 1.5,
    "HardtanhBackward": lambda node: 1.0,
    "LeakyReluBackward": lambda node: max(1.0, abs(float(saved["negative_slope"](node)))),
    "LogSigmoidBackward": lambda node: 1.0,
    "MishBackward": lambda node: MISH,
    "ReluBackward": lambda node: 1.0,
    "SigmoidBackward": lambda node: 0.25,
    "SiluBackward": lambda node: SILU,
    "SoftplusBackward": lambda node: 1.0,
    "TanhBackward": lambda node: 1.0,
    "ThresholdBackward": lambda node: None,
}


def kind(node: Any) -> str:
    """Return the name of a backward node without its number."""
    return node.name().rstrip("0123456789")


@dataclass(frozen=True)
class ActivationSlopes:
    """The slopes of one activation.

    Attributes:
        name: of the layer whose outputs it takes; ``name#2`` for a second activation behind the same layer.
        values: ``(rows, units)``: samples and positions, and features or channels.
        largest: ``sup |phi'|``; 1 where it is unknown.
    """

    name: str
    values: Tensor
    largest: float


def activation_slopes(root: ModuleCall, repeats: int = 1) -> tuple[ActivationSlopes, ...]:
    """Return ``phi'`` at each elementwise activation of a forward pass, from its graph, before its backward pass.

    A node of the graph returns the slope itself when it is given ones. A module without parameters that is made of
    several functions (``x * sigmoid(x)``, the GELU of transformers) counts as one activation, if a random probe shows
    that it is elementwise. Activations of recurrent layers run inside of one kernel, and are not seen; nor are those
    after the last module, which belong to the loss. Gates (a sigmoid that multiplies) are activations, too.

    Args:
        root: the calls of the pass.
        repeats: how often the same calls follow one another, with the same units at other samples.

    Cost: one elementwise pass for each activation.
    """
    calls = [call for call in leaves(root) if call.exit is not None]
    inside: set[Any] = set()
    composites: dict[Any, ModuleCall] = {}
    for call in calls:
        interior = set(walk([call.exit], stop=call.entry)).difference(call.entry)
        if len(interior) > 1 and any(kind(node) in NODES for node in interior) and not list(call.module.parameters()):
            inside.update(interior)
            composites[call.exit] = call
    # The outputs of a layer are the units.
    layers = {call.exit: (i, call) for i, call in enumerate(calls) if call.begins_layer}
    slopes: list[ActivationSlopes] = []
    for node in walk(call.exit for call in calls):  # those of earlier modules first
        if node in composites:
            values, largest = _of_composite(composites[node]), 1.0
        elif kind(node) in NODES and node not in inside:
            values, largest = _of_node(node), NODES[kind(node)](node) or 1.0
        else:
            continue
        feeding = max(upstream(node, layers), key=lambda pair: pair[0], default=None)
        if values is None or feeding is None:
            continue
        axis = 1 if "Convolution" in kind(feeding[1].exit) else values.ndim - 1
        slopes.append(ActivationSlopes(feeding[1].name, values.movedim(axis, -1).flatten(0, -2), largest))
    return _merged(slopes, repeats)


def _merged(slopes: list[ActivationSlopes], repeats: int) -> tuple[ActivationSlopes, ...]:
    """Join the rows of the same units, and number activations behind the same layer."""
    n = len(slopes) // repeats
    if len(slopes) % repeats or any(slopes[i].name != slopes[i % n].name for i in range(len(slopes))):
        n, repeats = len(slopes), 1
    merged: list[ActivationSlopes] = []
    for i in range(n):
        name = slopes[i].name
        earlier = sum(other.name.split("#")[0] == name for other in merged)
        rows = torch.cat([same.values for same in slopes[i::n]])
        merged.append(ActivationSlopes(f"{name}#{earlier + 1}" if earlier else name, rows, slopes[i].largest))
    return tuple(merged)


def _of_node(node: Any) -> Tensor | None:
    output = metadata(node)[0]
    if len(output.shape) < 2:
        return None
    with torch.no_grad():
        return node(torch.ones(output.shape, dtype=output.dtype, device=output.device))


def _of_composite(call: ModuleCall) -> Tensor | None:
    y, x = call.sent, call.received[0]
    if y is None or y.shape != x.shape or y.ndim < 2 or not x.requires_grad:
        return None

    def pulled(u: Tensor) -> Tensor | None:
        return torch.autograd.grad(y, x, u, retain_graph=True, allow_unused=True)[0]

    slope = pulled(torch.ones_like(y))
    signs = torch.randint(0, 2, y.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(y)
    probe = pulled(signs)
    if slope is None or probe is None:
        return None
    tolerance = 1e-3 * slope.abs() + 1e-5 * slope.abs().amax()
    return slope if bool(((probe - signs * slope).abs() <= tolerance).all()) else None
