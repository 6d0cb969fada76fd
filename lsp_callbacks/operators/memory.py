"""What measurements hold in memory, predicted from what a training step holds."""

from __future__ import annotations

import math

from torch import nn

from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.divided_step import graph_memory
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.step.snapshot import Snapshot


def forward_memory(snapshot: Snapshot) -> dict[str, float]:
    """Return the bytes at the peak of one forward pass with its graph, by purpose."""
    held = footprint(snapshot)
    return {"activations": held.activations, "copies": 2 * held.buffers}


#: Memory of the graph of a replay with held slopes, and of these, in units of the activations: measured in
#: ``benchmarks/memory_is_predicted.py``.
HELD = 2.2
#: Work vectors beside those of the routine: measured in ``benchmarks/memory_is_predicted.py``.
WORK = 7.0


def product_memory(snapshot: Snapshot, method: Method, vectors: float) -> dict[str, float]:
    """Return the bytes at the peak of Hessian products on one step, by purpose.

    Args:
        snapshot: the step.
        method: of the products, see `lsp_callbacks.operators.hessian`.
        vectors: how many vectors over all parameters the routine holds.

    Returns:
        Bytes by purpose; the graph of exact products is kept until the step's measurements end.
    """
    held = footprint(snapshot)
    if resolved(snapshot, method) == "exact":
        activations = {"graph": graph_memory(snapshot)}
    else:
        activations = {"activations": (HELD if snapshot.graph.kinked else 1.0) * held.activations}
    return {**activations, "vectors": (WORK + vectors) * held.parameters, "copies": 2 * held.buffers}


def unfolded(snapshot: Snapshot, samples: int) -> float:
    """Return the bytes of the largest convolution's input as a matrix of patches, with half the samples' gradients.

    Args:
        snapshot: the step.
        samples: how many.

    Returns:
        Bytes; 0 without a convolution.
    """
    largest = 0.0
    modules = dict(snapshot.module.named_modules())
    for name, call in snapshot.calls.items():
        layer = modules[name]
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and call.output_shape is not None:
            patches = layer.weight[0].numel() * layer.groups * math.prod(call.output_shape[2:])
            numbers = samples * (patches + layer.weight.numel() / 2)
            largest = max(largest, numbers * layer.weight.element_size())
    return largest
