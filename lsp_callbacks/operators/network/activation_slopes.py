"""The slopes of all activations of one forward pass, whether they are modules or functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.module_calls import Passage, leaves, upstream

GELU_TANH = 1.1289930686587717  # near 1.4185; that of the exact GELU is 9e-5 below
SILU = 1.0998393201288670  # x sigmoid(x), near 2.3994
MISH = 1.0884981612517280  # near 1.4906

#: ``sup |phi'|`` from the backward node of an elementwise activation; None where phi may jump.
NODES: dict[str, Callable[[Any], float | None]] = {
    "CeluBackward": lambda node: 1.0,
    "EluBackward": lambda node: max(
        abs(float(node._saved_scale)), abs(float(node._saved_alpha * node._saved_scale * node._saved_input_scale))
    ),
    "GeluBackward": lambda node: GELU_TANH,
    "HardsigmoidBackward": lambda node: 1 / 6,
    "HardswishBackward": lambda node: 1.5,
    "HardtanhBackward": lambda node: 1.0,
    "LeakyReluBackward": lambda node: max(1.0, abs(float(node._saved_negative_slope))),
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
    """The name of a backward node without its number."""
    return node.name().rstrip("0123456789")


@dataclass(frozen=True)
class Slopes:
    """Of one activation.

    Attributes:
        name: of the layer whose outputs it takes; ``name#2`` for a second activation behind the same layer.
        values: ``(rows, units)``: samples and positions, and features or channels.
        largest: ``sup |phi'|``; 1 where it is not known.
    """

    name: str
    values: Tensor
    largest: float


def slopes(root: Passage, repeats: int = 1) -> tuple[Slopes, ...]:
    """Asks the graph of a forward pass for ``phi'`` at each elementwise activation, before its backward pass.

    A node of the graph returns the slope itself where it is given ones. A module without parameters that is made of
    several functions (``x * sigmoid(x)``, the GELU of transformers) is taken as one activation, if a random probe shows
    that it is elementwise. Activations of recurrent layers run inside of one kernel, and are not seen; nor are those
    after the last module, which belong to the loss. Gates (a sigmoid that multiplies) are activations, too.

    Args:
        root: the calls of the pass.
        repeats: how often the same calls come one after the other, with the same units at other samples.

    Cost: one elementwise pass for each activation.
    """
    calls = [call for call in leaves(root) if call.exit is not None]
    inside: set[Any] = set()
    composites: dict[Any, Passage] = {}
    for call in calls:
        interior = _interior(call)
        if len(interior) > 1 and any(kind(node) in NODES for node in interior) and not list(call.module.parameters()):
            inside.update(interior)
            composites[call.exit] = call
    # A layer's outputs are the units.
    weighty = {call.exit: (i, call) for i, call in enumerate(calls) if call.begins}
    found: list[Slopes] = []
    for node in _in_order(calls):
        if node in composites:
            call = composites[node]
            values, largest = _of_composite(call), 1.0
        elif kind(node) in NODES and node not in inside:
            values, largest = _of_node(node), NODES[kind(node)](node) or 1.0
        else:
            continue
        feeding = max(upstream(node, weighty), key=lambda pair: pair[0], default=None)
        if values is None or feeding is None:
            continue
        axis = 1 if "Convolution" in kind(feeding[1].exit) else values.ndim - 1
        found.append(Slopes(feeding[1].name, values.movedim(axis, -1).flatten(0, -2), largest))
    return _merged(found, repeats)


def _merged(found: list[Slopes], repeats: int) -> tuple[Slopes, ...]:
    """Rows of the same units together, and names told apart."""
    n = len(found) // repeats
    if len(found) % repeats or any(found[i].name != found[i % n].name for i in range(len(found))):
        n, repeats = len(found), 1
    merged: list[Slopes] = []
    for i in range(n):
        same = found[i::n] if n else []
        seen = sum(one.name.split("#")[0] == found[i].name for one in merged)
        name = f"{found[i].name}#{seen + 1}" if seen else found[i].name
        merged.append(Slopes(name, torch.cat([one.values for one in same]), found[i].largest))
    return tuple(merged)


def _interior(call: Passage) -> set[Any]:
    """The backward nodes of a module's own functions."""
    if call.exit in call.entry:
        return set()
    found, stack = set(), [call.exit]
    while stack:
        node = stack.pop()
        if node is not None and node not in found and node not in call.entry:
            found.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return found


def _in_order(calls: list[Passage]) -> list[Any]:
    """All nodes before the modules' outputs, each once, those of earlier modules first."""
    seen: dict[Any, None] = {}
    for call in calls:
        new, stack = [], [call.exit]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen[node] = None
                new.append(node)
                stack.extend(child for child, _ in node.next_functions)
        for node in reversed(new):  # from the input to the output
            del seen[node]
            seen[node] = None
    return list(seen)


def _of_node(node: Any) -> Tensor | None:
    like = node._input_metadata[0]
    if len(like.shape) < 2:
        return None
    with torch.no_grad():
        return node(torch.ones(like.shape, dtype=like.dtype, device=like.device))


def _of_composite(call: Passage) -> Tensor | None:
    y, x = call.sent, call.received[0]
    if y is None or y.shape != x.shape or y.ndim < 2 or not x.requires_grad:
        return None

    def pulled(u: Tensor) -> Tensor | None:
        return torch.autograd.grad(y, x, u, retain_graph=True, allow_unused=True)[0]

    slope = pulled(torch.ones_like(y))
    signs = torch.randint(0, 2, y.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(y)
    probe = pulled(signs)
    if (
        slope is None
        or probe is None
        or not bool(((probe - signs * slope).abs() <= 1e-3 * slope.abs() + 1e-5 * slope.abs().amax()).all())
    ):
        return None
    return slope
