"""Backward rules of layers without parameters, for some samples of a batch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import metadata, saved
from lsp_callbacks.autograd.graph_pull import UnknownGraph

aten = torch.ops.aten
Pick = Callable[[Tensor], Tensor]


def _reshaped(node: Any, g: Tensor, pick: Pick) -> tuple[Tensor]:
    child, k = node.next_functions[0]
    return (g.reshape(len(g), *metadata(child)[k].shape[1:]),)


def _mean(node: Any, g: Tensor, pick: Pick) -> tuple[Tensor]:
    child, k = node.next_functions[0]
    shape = metadata(child)[k].shape[1:]
    if not saved["keepdim"](node):
        axes = sorted((axis - 2**64 if axis >= 2**63 else axis) % (len(shape) + 1) for axis in saved["dim"](node))
        for axis in axes:
            g = g.unsqueeze(axis)
    count = math.prod(shape) / max(g[0].numel(), 1)
    return ((g / count).expand(len(g), *shape),)


def _max_pool(node: Any, g: Tensor, pick: Pick) -> tuple[Tensor]:
    how = [saved[name](node) for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
    x, places = pick(saved["self"](node)), pick(saved["result1"](node))
    return (aten.max_pool2d_with_indices_backward(g, x, *how, places),)


#: By the name of a node: from it, the gradients at its output, ``(n, ...)``, and what picks those samples from the N of
#: the batch, which come first in what it has saved, to the gradients at its inputs.
ROW_RULES: dict[str, Callable[[Any, Tensor, Pick], tuple[Tensor, ...]]] = {
    "ReluBackward0": lambda node, g, pick: (aten.threshold_backward(g, pick(saved["result"](node)), 0),),
    "TanhBackward0": lambda node, g, pick: (aten.tanh_backward(g, pick(saved["result"](node))),),
    "SigmoidBackward0": lambda node, g, pick: (aten.sigmoid_backward(g, pick(saved["result"](node))),),
    "SiluBackward0": lambda node, g, pick: (aten.silu_backward(g, pick(saved["self"](node))),),
    "GeluBackward0": lambda node, g, pick: (
        aten.gelu_backward(g, pick(saved["self"](node)), approximate=saved["approximate"](node)),
    ),
    "AddBackward0": lambda node, g, pick: (g, g if saved["alpha"](node) == 1 else g * saved["alpha"](node)),
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "MeanBackward1": _mean,
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "CloneBackward0": lambda node, g, pick: (g,),
}


def row_inputs(node: Any, g: Tensor, pick: Pick) -> tuple[Tensor, ...]:
    """Return the gradients at the inputs of a node for some samples, which ``pick`` takes from the batch.

    Raises:
        UnknownGraph: for a node without a rule.
    """
    rule = ROW_RULES.get(node.name())
    if rule is None:
        raise UnknownGraph(f"no rule for some samples of {node.name()}")
    return rule(node, g, pick)
