"""What a training step holds in memory for its backward pass, from one replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.snapshot import Snapshot


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        parameters: of one vector over all trainable parameters.
        activations: that the graph of one loss keeps for its backward pass; parameters are not among them.
        buffers: of the module.
    """

    parameters: float
    activations: float
    buffers: float


def footprint(snapshot: Snapshot) -> Footprint:
    """Replays the loss once, and counts what autograd saves: each storage once, parameters not.

    Cost: one forward pass. Memory: what the step's own forward pass took.
    """
    return snapshot.once("footprint", lambda: _footprint(snapshot))


def _footprint(snapshot: Snapshot) -> Footprint:
    known = {p.untyped_storage().data_ptr() for p in snapshot.module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = snapshot.replay()
        del loss
    return Footprint(
        parameters=float(sum(p.numel() * p.element_size() for p in snapshot.parameters.values())),
        activations=float(sum(saved.values())),
        buffers=float(sum(b.numel() * b.element_size() for b in snapshot.module.buffers())),
    )
