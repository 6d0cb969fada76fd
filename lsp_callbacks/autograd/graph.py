"""What the autograd graph of a loss says about its derivatives, and the one walk through such graphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import custom_functions, least_precise

# Backward nodes of functions whose derivative jumps.
_KINKS = re.compile(
    r"(Relu|LeakyRelu|Rrelu|Prelu|Threshold|Hardtanh|Hardswish|Hardsigmoid|Abs|Clamp|Maximum|Minimum|Max|Min|Amax|Amin"
    r"|Maxpool|MaxPool|AdaptiveMaxPool|FractionalMaxPool|L1Loss|SmoothL1|Huber|Softshrink|Hardshrink|Sign|Round|Floor|Sort|Topk|MultiMargin)"
)
# Attention in one kernel, which cannot be differentiated twice.
_FUSED = re.compile(r"ScaledDotProduct(Flash|Efficient|Cudnn|FusedAttention)")


def inputs_of(node: Any) -> list[Any]:
    """Return the backward nodes that a node passes gradients to; None where an argument needs no gradient."""
    return [child for child, _ in node.next_functions]


def walk(
    roots: Iterable[Any], stop: Container[Any] = (), inputs: Callable[[Any], Iterable[Any]] = inputs_of
) -> Iterator[Any]:
    """Yield the backward nodes that some roots depend on, the roots included: each once, inputs before outputs.

    Args:
        roots: backward nodes, such as ``loss.grad_fn``; None is skipped.
        stop: nodes that are yielded, but whose inputs are not visited through them.
        inputs: from a node to those that it depends on, to leave some of them out.
    """
    seen: set[Any] = {None}
    for root in roots:
        stack = [root]
        while stack:  # without recursion: graphs are deep
            node = stack[-1]
            waiting = [] if node in seen or node in stop else [c for c in inputs(node) if c not in seen]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if node not in seen:
                seen.add(node)
                yield node


def leaf_of(node: Any) -> Tensor | None:
    """Return the leaf tensor whose gradient a node accumulates; None for the node of an operation."""
    return getattr(node, "variable", None)


def leaves_of(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors that a tensor depends on."""
    return {id(leaf_of(node)) for node in walk([output.grad_fn])}


def depends_beside(output: Tensor, part: Tensor) -> bool:
    """Return whether a tensor depends on any leaf otherwise than through another tensor."""
    return any(leaf_of(node) is not None for node in walk([output.grad_fn], {part.grad_fn}))


def nodes_between(outputs: Iterable[Tensor], leaves: Iterable[Tensor]) -> set[Any]:
    """Return the backward nodes on the paths from any of the leaves to any of the outputs."""
    wanted = {id(leaf) for leaf in leaves}
    on_path: set[Any] = set()
    for node in walk(output.grad_fn for output in outputs):
        if id(leaf_of(node)) in wanted or any(child in on_path for child in inputs_of(node)):
            on_path.add(node)
    return on_path


def kinks_between(output: Tensor, leaves: Iterable[Tensor]) -> tuple[str, ...]:
    """Return the names of the nodes whose derivative jumps, on the paths from the leaves to the output."""
    return tuple(sorted({name for node in nodes_between([output], leaves) if _KINKS.match(name := node.name())}))


@dataclass(frozen=True)
class Graph:
    """Properties of all nodes between a loss and its parameters.

    Attributes:
        kinks: names of the nodes whose derivative jumps: ReLU, max-pooling and similar functions.
        fused: whether attention ran in a kernel that cannot be differentiated twice.
        dtype: the least precise floating-point type among the nodes.
        custom: names of ``torch.autograd.Function`` classes that are not PyTorch's own. Whether their backward can be
            differentiated is unknown: ``once_differentiable`` may give a wrong second derivative without an error.
        stopped: functions by which what depends on the parameters left the graph, and entered it again: see
            `lsp_callbacks.autograd.stop_gradients`.
    """

    kinks: tuple[str, ...]
    fused: bool
    dtype: torch.dtype
    custom: tuple[str, ...]
    stopped: tuple[str, ...] = ()

    @cached_property
    def kinked(self) -> bool:
        """Whether the loss is only piecewise smooth."""
        return bool(self.kinks)

    @cached_property
    def full(self) -> bool:
        """Whether nothing is rounded to half precision."""
        return self.dtype.itemsize > 2


def read(loss: Tensor) -> Graph:
    """Return the properties of the autograd graph of a loss; of a replay with shards, that of the module's own loss."""
    loss = getattr(loss.grad_fn, "replayed", loss)
    nodes = list(walk([loss.grad_fn]))
    names = {node.name() for node in nodes}
    kinks, fused = tuple(sorted(filter(_KINKS.match, names))), any(map(_FUSED.match, names))
    return Graph(kinks, fused, least_precise(nodes, loss.dtype), tuple(sorted(custom_functions(nodes))))


def joined(graphs: Iterable[Graph]) -> Graph:
    """Return the properties that hold for the mean of several losses."""
    graphs = list(graphs)
    return Graph(
        kinks=tuple(sorted({name for graph in graphs for name in graph.kinks})),
        fused=any(graph.fused for graph in graphs),
        dtype=min((graph.dtype for graph in graphs), key=lambda dtype: dtype.itemsize),
        custom=tuple(sorted({name for graph in graphs for name in graph.custom})),
        stopped=tuple(sorted({name for graph in graphs for name in graph.stopped})),
    )
