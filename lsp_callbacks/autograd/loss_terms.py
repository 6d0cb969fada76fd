"""The terms that a loss is the sum of, from its graph: criteria of outputs, and what has no curvature in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import saved
from lsp_callbacks.autograd.graph_pull import UnknownGraph, pull, summed

#: Nodes that are linear in what depends on the parameters, between a loss and its criterion. Of the second kind, where
#: one factor alone depends on them.
LINEAR = {
    "NllLossBackward0", "NllLoss2DBackward0", "AddBackward0", "SubBackward0", "NegBackward0", "SumBackward0",
    "SumBackward1", "MeanBackward0", "MeanBackward1", "ViewBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "ToCopyBackward0", "CloneBackward0", "MaskedFillBackward0",
    "StackBackward0", "CatBackward0",
}  # fmt: skip
BILINEAR = {"MulBackward0", "DivBackward0", "MulBackward1", "DivBackward1"}
LOG_SOFTMAX, SQUARE, LOGISTIC = "LogSoftmaxBackward0", "MseLossBackward0", "BinaryCrossEntropyWithLogitsBackward0"
#: What a loss is linear in without any curvature: the probabilities of a router, of which load is balanced.
SOFTMAX, LOG_SUM = "SoftmaxBackward0", "LogsumexpBackward0"
#: Nodes that change the shape of logits, or their type, alone.
SAME_ENTRIES = {
    "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0", "UnsqueezeBackward0", "SqueezeBackward0",
    "CloneBackward0", "AliasBackward0",
}  # fmt: skip


class Term(NamedTuple):
    """A criterion in a loss.

    Attributes:
        node: of the graph, whose first input are the outputs.
        slope: of the loss in what the node returns.
        squares: the factors of the squares of the outputs' log-sum-exp that the loss has beside it (z-loss), in the
            order of these; None where it has none.
        log_sums: the log-sum-exps.
    """

    node: Any
    slope: Tensor
    squares: Tensor | None = None
    log_sums: Tensor | None = None


@torch.no_grad()
def read_terms(nodes: list[Any], kinds: Sequence[str]) -> list[Term]:
    """Return the criteria that a loss is the sum of, in the order of the graph.

    What is linear in probabilities of a softmax is left out: as a criterion of these it has no curvature.

    Args:
        nodes: of the loss's graph, outputs first.
        kinds: their names.

    Raises:
        UnknownGraph: for other losses.
    """
    reached, above = {nodes[0]}, []
    criteria: list[Any] = []
    squares: dict[Any, Any] = {}
    for node, kind in zip(nodes, kinds):
        if node not in reached:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if kind in (LOG_SOFTMAX, SQUARE, LOGISTIC):
            criteria.append(node)
        elif (log_sum := _squared_log_sum(node, kind)) is not None:
            squares[node] = log_sum
        elif kind in LINEAR or (kind in BILINEAR and len(children) == 1):
            if kind.startswith("NllLoss") and saved["weight"](node) is not None:
                raise UnknownGraph("classes have weights")
            above.append(node)
            reached.update(children)
        elif kind != SOFTMAX:
            raise UnknownGraph(f"the loss is not the value of one criterion: {kind}")
    if not criteria:
        raise UnknownGraph("the loss is the value of no known criterion")
    if len(criteria) > 1 and any(node.name() != LOG_SOFTMAX for node in criteria):
        raise UnknownGraph("the loss is the sum of several criteria")
    first = saved["result" if criteria[0].name() == LOG_SOFTMAX else "self"](criteria[0])
    slopes = pull(above, {nodes[0]: first.new_ones(())}, None, summed)
    beside: dict[Any, Tensor] = {}
    values: dict[Any, Tensor] = {}
    for node, log_sum in squares.items():
        factors = _in_order(slopes[node][0], log_sum)
        same = [criterion for criterion in criteria if _outputs(criterion) == _outputs(log_sum)]
        if len(same) != 1 or factors.numel() * saved["result"](same[0]).shape[-1] != saved["result"](same[0]).numel():
            raise UnknownGraph("the loss has the squares of a log-sum-exp of others than the outputs")
        beside[same[0]] = beside[same[0]] + factors if same[0] in beside else factors
        values[same[0]] = saved["result"](log_sum).detach().reshape(-1)
    return [Term(node, slopes[node][0], beside.get(node), values.get(node)) for node in criteria]


def is_last_axis(node: Any) -> bool:
    """Return whether the classes of a softmax or log-sum-exp are in the last axis of its input."""
    dim = saved["dim"](node)
    (dim,) = dim if isinstance(dim, tuple | list) else (dim,)
    if dim >= 2**63:
        return dim == 2**64 - 1
    return dim == saved["self" if node.name() == LOG_SUM else "result"](node).ndim - 1


def same_entries(node: Any, place: int) -> tuple[Any, int]:
    """Return the node and the place of its output whose entries a tensor has, in the same order."""
    while node is not None and node.name() in SAME_ENTRIES:
        node, place = node.next_functions[0]
    return node, place


def _squared_log_sum(node: Any, kind: str) -> Any:
    """Return the node of the log-sum-exp that a node squares; None if it does not."""
    children = [child for child, _ in node.next_functions if child is not None]
    is_square = kind == "PowBackward0" and float(saved["exponent"](node)) == 2
    if not is_square and not (kind == "MulBackward0" and len(children) == 2 and children[0] is children[1]):
        return None
    child, _ = same_entries(children[0], 0)
    return child if child.name() == LOG_SUM else None


def _in_order(slope: Tensor, log_sum: Any) -> Tensor:
    if not is_last_axis(log_sum):
        raise UnknownGraph("a log-sum-exp of another axis than the last one")
    return slope.expand(saved["result"](log_sum).shape).reshape(-1) if slope.ndim == 0 else slope.reshape(-1)


def _outputs(node: Any) -> tuple[Any, int]:
    if not is_last_axis(node):
        return node, -1
    return same_entries(*node.next_functions[0])
