"""The optimizer of a step, the options of each parameter, and the clipped gradient that it receives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.trajectory.update_rules import Group
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot, computed_once


def require_optimizer(snapshot: Snapshot) -> torch.optim.Optimizer:
    """Return the step's optimizer.

    Raises:
        Unmeasurable: if there is none, or the step is not that of the optimizer on the step's loss.
    """
    if snapshot.optimizer is None:
        raise Unmeasurable("the snapshot has no optimizer: pass optimizer=... to the Snapshot")
    if why := snapshot.run.unsupported or snapshot.mismatch or snapshot.run.invalidated:
        raise Unmeasurable(why)
    return snapshot.optimizer


def group_of(snapshot: Snapshot) -> dict[str, Group | None]:
    """Return the options of each trainable parameter in this step; None if the optimizer does not hold it."""
    optimizer = require_optimizer(snapshot)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: groups.get(id(p)) for name, p in snapshot.unsplit.parameters.items()}


def held_mask(snapshot: Snapshot) -> Tensor | None:
    """Return 1 where the optimizer holds a parameter, 0 elsewhere, flat; None if it holds all."""
    groups = group_of(snapshot).values()
    if all(group is not None for group in groups):
        return None
    parameters = list(snapshot.parameters.values())
    return flatten([None if g is None else torch.ones_like(p) for g, p in zip(groups, parameters)], parameters)


@computed_once
def clipped_gradient(snapshot: Snapshot) -> Tensor:
    """Return the gradient that the optimizer receives, flat: clipped, and 0 where a parameter has none."""
    return _clip(snapshot)(_gradient(snapshot))


def clipped_change(snapshot: Snapshot, change: Tensor) -> Tensor:
    """Return the change of the clipped gradient, to first order, for a change of the step's gradient."""
    if snapshot.clipping is None:
        return change
    gradient, held = _gradient(snapshot), held_mask(snapshot)
    if held is not None:
        gradient, change = held * gradient, held * change
    return snapshot.clipping.change(gradient, change)


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
