"""What a training step holds in memory for its backward pass, from one replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.spread_tensors import local
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: Memory of a graph that can be differentiated twice, in units of the activations: measured in
#: ``benchmarks/memory_is_predicted.py``.
TWICE = 4.0


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
    counted = {local(p).untyped_storage().data_ptr() for p in snapshot.module.parameters()}
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


#: Where `computed_once` keeps it among what is shared of a snapshot: that of an earlier step may be put there, so that
#: no pass has to be counted.
FOOTPRINT = (footprint.__wrapped__, ())  # type: ignore[attr-defined]


def readable(count: float) -> str:
    """Return bytes in the unit that fits.

    Example:
        >>> from lsp_callbacks.operators.footprint import readable
        >>> readable(300), readable(2.345e9)
        ('300 B', '2.3 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2g} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"
