"""Gradients from a graph that training has yet to differentiate: node by node, and nothing of it is noticed there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lsp_callbacks.autograd._torch_internals import call, calls_users_code, is_identity, metadata


class UnknownGraph(Exception):
    """A graph that cannot be read without a trace, or in which something is computed that no rule covers."""


#: From a node and the gradients at its outputs to those at its inputs; None calls the node itself.
Rule = Callable[[Any, list[Tensor | None]], "Iterable[Tensor | None] | None"]
#: From a node, one of its outputs and a gradient of another shape to that of the output's shape; None goes no further.
Reshape = Callable[[Any, int, Tensor], "Tensor | None"]


def summed(node: Any, k: int, g: Tensor) -> Tensor:
    """Return a gradient summed to the shape of one of a node's outputs, which was broadcast: a `Reshape`."""
    return g.sum_to_size(tuple(metadata(node)[k].shape))


def outputs_first(root: Any) -> list[Any]:
    """Return the backward nodes that a root depends on, each before those that it depends on."""
    seen: set[Any] = set()
    nodes, stack = [], [(root, False)]
    while stack:  # without recursion: graphs are deep
        node, is_left = stack.pop()
        if is_left:
            nodes.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            for child, _ in node.next_functions:
                if child is not None and child not in seen:
                    stack.append((child, False))
    nodes.reverse()
    return nodes


def plain_kinds(nodes: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of nodes, none of which runs the user's code: it would run once more than in training.

    Raises:
        UnknownGraph: for a custom function, or where saved tensors are unpacked by a hook (activation checkpoints).
    """
    kinds = []
    for node in nodes:
        kinds.append(node.name())
        if calls_users_code(node) and not is_identity(node):
            raise UnknownGraph(f"{kinds[-1]} runs code of the user's")
    return tuple(kinds)


def pull(
    nodes: list[Any], cotangents: Mapping[Any, Tensor | dict[int, Tensor]], rule: Rule | None, reshape: Reshape
) -> dict[Any, dict[int, Tensor]]:
    """Take cotangents back through a graph, by calling its nodes in their order; called where no graph is recorded.

    Not by the engine of autograd, which would call the hooks of tensors and nodes, among them those of the user's that
    count how often they are called. Whatever the graph holds stays there for training's own backward pass.

    Args:
        nodes: of the graph, outputs first, see `outputs_first`.
        cotangents: at the first output of some nodes, or at several by their places.
        rule: is asked at each node that a gradient reaches; None calls all of them.
        reshape: is asked where a gradient has another shape than the output: something was broadcast.

    Returns:
        What arrives at nodes that are not among these, by the place of the output; ``rule`` sees what arrives at these.

    Cost: a backward pass; without what ``rule`` leaves out.
    """
    waiting: dict[Any, dict[int, Tensor]] = {
        node: cotangent if isinstance(cotangent, dict) else {0: cotangent} for node, cotangent in cotangents.items()
    }
    for node in nodes:
        slots = waiting.pop(node, None)
        if slots is None:
            continue
        outputs: list[Tensor | None] = list(map(slots.get, range(len(metadata(node)))))
        inputs = outputs if is_identity(node) else None if rule is None else rule(node, outputs)
        for (child, k), g in zip(node.next_functions, call(node, outputs) if inputs is None else inputs):
            if child is None or g is None:
                continue
            entry = metadata(child)[k]
            if list(g.shape) != entry.shape:
                reduced = reshape(child, k, g)
                if reduced is None:
                    continue
                g = reduced
            if g.dtype is not entry.dtype:
                g = g.to(entry.dtype)
            kept = waiting.setdefault(child, {})
            kept[k] = kept[k] + g if k in kept else g
    return waiting
