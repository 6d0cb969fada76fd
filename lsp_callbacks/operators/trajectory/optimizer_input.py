"""The clipped gradient that the optimizer of a step receives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.operators.parts_of_shards import parts_of_shards
from lsp_callbacks.operators.trajectory.spread_step import clip_factor, gradient_size
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot, computed_once


def held_mask(snapshot: Snapshot) -> Tensor | None:
    """Return 1 where the optimizer holds a parameter, 0 elsewhere, flat; None if it holds all."""
    groups = snapshot.groups.values()
    if all(group is not None for group in groups):
        return None
    parameters = list(snapshot.parameters.values())
    return flatten([None if g is None else torch.ones_like(p) for g, p in zip(groups, parameters)], parameters)


@computed_once
def clipped_gradient(snapshot: Snapshot) -> Tensor:
    """Return the gradient that the optimizer receives, flat: clipped, and 0 where a parameter has none."""
    if snapshot.held is not None:
        return clip_factor(snapshot) * _gradient(snapshot)
    return _clip(snapshot)(_gradient(snapshot))


def clipped_change(snapshot: Snapshot, change: Tensor) -> Tensor:
    """Return the change of the clipped gradient, to first order, for a change of the step's gradient."""
    if snapshot.clipping is None:
        return change
    if snapshot.held is not None:
        return _change_of_shards(snapshot, change)
    gradient, held = _gradient(snapshot), held_mask(snapshot)
    if held is not None:
        gradient, change = held * gradient, held * change
    return snapshot.clipping.change(gradient, change)


def _change_of_shards(snapshot: Snapshot, change: Tensor) -> Tensor:
    """Return what `Clipping.change` does, by norm, of shards."""
    factor, gradient = clip_factor(snapshot), _gradient(snapshot)
    if factor == 1:
        return change
    size, parts = float(gradient_size(snapshot)), parts_of_shards(snapshot)
    along = float(parts.total(torch.dot(parts.once(gradient), change.to(gradient))[None])) / size
    return factor * (change - gradient * (along / (size + 1e-6)))


def _gradient(snapshot: Snapshot) -> Tensor:
    return snapshot.flat_gradient if snapshot.flat_gradient is not None else _replayed_gradient(snapshot)


@computed_once
def _replayed_gradient(snapshot: Snapshot) -> Tensor:
    return replayed_gradient(snapshot)[1]


def _clip(snapshot: Snapshot) -> Callable[[Tensor], Tensor]:
    clipping = snapshot.clipping
    if clipping is None:
        return lambda g: g
    held = held_mask(snapshot)
    return lambda g: clipping(g if held is None else held * g)
