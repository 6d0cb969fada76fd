"""The cost of norms, or of condition numbers, of all layers of a network."""

from __future__ import annotations

import math

from torch import nn

from lsp_callbacks.functional.curvature.condition import SMALL
from lsp_callbacks.operators.cost import beside
from lsp_callbacks.step.replay_checks import Call
from lsp_callbacks.step.snapshot import Snapshot

#: Nanoseconds of a layer's calls, of each of its eigenvalues' steps, and of Lanczos where it is too long for them.
LAYER, EIGEN, LONG = 1e7, 1.2, 8e7


def norms_cost(snapshot: Snapshot) -> float:
    """Return the gradients that norms, or condition numbers, of all layers cost, see `operators.cost`."""
    modules = dict(snapshot.module.named_modules())
    return beside(snapshot, time=sum(_time(modules[name], call) for name, call in snapshot.calls.items()))


def _time(layer: nn.Module, call: Call) -> float:
    matrices = [p for p in layer.parameters(recurse=False) if p.ndim > 1]
    if not matrices or call.input_shape is None or call.output_shape is None:
        return 0.0
    sides = (
        matrices[0].shape
        if matrices[0].ndim == 2
        else (math.prod(call.input_shape[1:]), math.prod(call.output_shape[1:]))
    )
    least, most = min(sides), max(sides)
    return LAYER + (2 * EIGEN * least**2 * most if least <= SMALL else LONG)
