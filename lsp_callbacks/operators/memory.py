"""What a training step holds in memory for its backward pass, from one replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.step.snapshot import Snapshot, computed_once


@dataclass(frozen=True)
class Footprint:
    """Memory of one training step, in bytes.

    Attributes:
        parameters: of one vector over all trainable parameters.
        activations: that the graph of one loss keeps for its backward pass; parameters are not among them.
        buffers: of the module.
    """

    parameters: float
    activations: float
    buffers: float


@computed_once
def footprint(snapshot: Snapshot) -> Footprint:
    """Replay the loss once, and count what autograd saves: each storage once, parameters not.

    Cost: one forward pass. Memory: what the step's own forward pass took.
    """
    counted = {p.untyped_storage().data_ptr() for p in snapshot.module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in counted:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, a node's own output would keep its node, and nothing would ever free them

    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = snapshot.replay()
        del loss
    return Footprint(
        parameters=float(sum(p.numel() * p.element_size() for p in snapshot.parameters.values())),
        activations=float(sum(saved.values())),
        buffers=float(sum(b.numel() * b.element_size() for b in snapshot.module.buffers())),
    )


def forward_memory(snapshot: Snapshot) -> dict[str, float]:
    """Return the bytes at the peak of one forward pass with its graph, by purpose."""
    held = footprint(snapshot)
    return {"activations": held.activations, "copies": 2 * held.buffers}


#: Memory of a graph that can be differentiated twice, in units of the activations, and work vectors beside those of the
#: routine: measured in ``benchmarks/memory_is_predicted.py``.
TWICE, WORK = 4.0, 7.0


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
    exact = resolved(snapshot, method) == "exact"
    activations = {"graph": TWICE * held.activations} if exact else {"activations": held.activations}
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
