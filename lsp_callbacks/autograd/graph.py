"""What the autograd graph of a loss tells of its derivatives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

# Backward nodes of functions whose derivative jumps.
_KINKS = re.compile(
    r"(Relu|LeakyRelu|Rrelu|Prelu|Threshold|Hardtanh|Hardswish|Hardsigmoid|Abs|Clamp|Maximum|Minimum|Max|Min|Amax|Amin"
    r"|Maxpool|MaxPool|AdaptiveMaxPool|FractionalMaxPool|L1Loss|SmoothL1|Huber|Softshrink|Hardshrink|Sign|Round|Floor|Sort|Topk|MultiMargin)"
)
# Attention in one kernel, which cannot be differentiated twice.
_FUSED = re.compile(r"ScaledDotProduct(Flash|Efficient|Cudnn|FusedAttention)")


@dataclass(frozen=True)
class Graph:
    """Properties of all nodes between a loss and its parameters.

    Attributes:
        kinked: whether the loss is only piecewise smooth: ReLU, max-pooling and their like.
        fused: whether attention ran in a kernel that cannot be differentiated twice.
        dtype: the least precise floating type on the way.
        custom: names of ``torch.autograd.Function`` classes that are not PyTorch's own. Nobody knows whether their
            backward can be differentiated: ``once_differentiable`` may give a wrong second derivative without a word.
        stopped: functions by which what depends on the parameters left the graph, and entered it again: see
            `lsp_callbacks.autograd.stop_gradients`.
    """

    kinked: bool
    fused: bool
    dtype: torch.dtype
    custom: tuple[str, ...]
    stopped: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Whether nothing is rounded to half precision."""
        return self.dtype.itemsize > 2


def read(loss: Tensor) -> Graph:
    """Walks the autograd graph of a loss."""
    seen, stack = set(), [loss.grad_fn]
    names: set[str] = set()
    dtypes = {loss.dtype}
    custom: set[str] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        dtypes.update(one.dtype for one in node._input_metadata)
        if isinstance(node, BackwardCFunction):
            function = node._forward_cls  # type: ignore[attr-defined]
            if not function.__module__.startswith("torch."):
                custom.add(function.__name__)
        stack.extend(child for child, _ in node.next_functions)
    return Graph(
        kinked=any(map(_KINKS.match, names)),
        fused=any(map(_FUSED.match, names)),
        dtype=min((one for one in dtypes if one.is_floating_point), key=lambda one: one.itemsize),
        custom=tuple(sorted(custom)),
    )


def kinks_between(output: Tensor, leaves: Iterable[Tensor]) -> tuple[str, ...]:
    """Names of the nodes whose derivative jumps, on the ways from the leaves to the output."""
    wanted = {id(leaf) for leaf in leaves}
    reaches: dict[object, bool] = {None: False}
    stack = [output.grad_fn]
    while stack:  # children first
        node = stack[-1]
        children = [] if node is None else [child for child, _ in node.next_functions]
        if node not in reaches and (below := [child for child in children if child not in reaches]):
            stack.extend(below)
            continue
        stack.pop()
        if node is not None:
            own = id(getattr(node, "variable", None)) in wanted
            reaches[node] = own or any(reaches[child] for child in children)
    names = (node.name() for node, on_the_way in reaches.items() if on_the_way and node is not None)  # type: ignore
    return tuple(sorted({name for name in names if _KINKS.match(name)}))


def leaves_of(output: Tensor) -> set[int]:
    """The ids of the leaves that a tensor depends on."""
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return {id(getattr(node, "variable", None)) for node in seen}


def joined(graphs: Iterable[Graph]) -> Graph:
    """What holds for the mean of several losses."""
    graphs = list(graphs)
    return Graph(
        kinked=any(graph.kinked for graph in graphs),
        fused=any(graph.fused for graph in graphs),
        dtype=min((graph.dtype for graph in graphs), key=lambda one: one.itemsize),
        custom=tuple(sorted({name for graph in graphs for name in graph.custom})),
        stopped=tuple(sorted({name for graph in graphs for name in graph.stopped})),
    )
