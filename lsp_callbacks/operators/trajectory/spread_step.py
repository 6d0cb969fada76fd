"""A step with shards of the parameters as its optimizer sees it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lsp_callbacks.autograd.graph_pull import UnknownGraph
from lsp_callbacks.autograd.spread_tensors import spread_like
from lsp_callbacks.step.snapshot import Snapshot, computed_once


@computed_once
def spread_step(snapshot: Snapshot) -> Snapshot:
    """Return a step with shards as its optimizer sees it: parameters and gradients as spread tensors.

    Clipping by norm is in the gradients already.

    Args:
        snapshot: any step; without shards it is returned itself.

    Raises:
        UnknownGraph: where numbers are clipped one by one.
    """
    if snapshot.held is None or snapshot.run.shards is None:
        return snapshot
    factor = clip_factor(snapshot)
    originals = dict(snapshot.module.named_parameters())
    gradient = None
    if snapshot.gradient is not None:
        gradient = {
            name: None if g is None else spread_like(g if factor == 1 else factor * g, originals[name])
            for name, g in snapshot.gradient.items()
        }
    return replace(snapshot, held=None, gradient=gradient, clipping=None)


@computed_once
def clip_factor(snapshot: Snapshot) -> float:
    """Return by what the step's gradient is multiplied before the optimizer sees it. Cost: an all-reduce if any."""
    if snapshot.clipping is None or snapshot.gradient is None or snapshot.run.shards is None:
        return 1.0
    if snapshot.clipping.kind == "value":
        raise UnknownGraph("numbers of the gradient are clipped one by one")
    return float(snapshot.clipping.factor(gradient_size(snapshot)[None]))


@computed_once
def gradient_size(snapshot: Snapshot) -> Tensor:
    """Return the norm of the gradient of a step with shards, before it is clipped. Cost: an all-reduce."""
    assert snapshot.gradient is not None and snapshot.run.shards is not None
    squares = {name: g.double().square().sum() for name, g in snapshot.gradient.items() if g is not None}
    return snapshot.run.shards.total(squares, "the norm of the gradient").sqrt()
