"""What is kept of a step: a copy from which it is replayed, only what is read from its graph, or all its shards."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.training_loop import TrainingLoop
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.room import Room
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.verified_step import verified

#: Of a run with shards.
MOVED = (
    "code of yours moves the parameters together with the optimizer (optimizer_step, prox), which is not followed "
    "where each process holds a shard of them"
)
NOT_KEPT = "the step could not be kept for a replay"


def kept_step(loop: TrainingLoop, monitor: Monitor, step: int, names: Collection[str]) -> PendingStep | None:
    """Return what is kept of a step at which something is measured, before its first forward pass; None if nothing is.

    Args:
        loop: that trains.
        monitor: that measures.
        step: number of the optimizer step.
        names: of the quantities that are measured at it.
    """
    readers, is_replayed, budget = {}, not loop.can_do_without_replay, monitor.budget
    if not loop.has_backward():
        return None
    try:
        is_replayed = is_replayed or loop.run.shards is not None  # of which a graph holds weights that are gone again
        for name, quantity in monitor.quantities.items():
            if name not in names:
                continue
            # Its memory and its price may not be known yet.
            is_replayed = is_replayed or quantity.needs_replay or name not in budget.predicted
            if (reader := quantity.reader(loop.module, loop.run, step)) is not None:
                readers[name] = reader
            is_replayed = is_replayed or (budget.work is None and monitor.cadence.wants_price(name))
        return loop.new_step(readers=readers, can_replay=is_replayed and loop.run.unknown_loss is None)
    except Exception as error:
        monitor.errors.caught(NOT_KEPT, error)
        return None


def players_step(loop: TrainingLoop, monitor: Monitor, step: int) -> PendingStep | None:
    """Return what a player's step is replayed from, if it is measured."""
    if not (monitor.wants(step) and loop.has_backward()):
        return None
    try:
        return loop.new_step()
    except Exception as error:
        monitor.errors.caught(NOT_KEPT, error)
        return None


def whole_step(
    seen: Callable[[PendingStep, torch.optim.Optimizer], Snapshot],
    pending: PendingStep,
    optimizer: torch.optim.Optimizer,
    loop: TrainingLoop,
    room: Callable[[], Room],
    *,
    has_moved: bool,
) -> Snapshot:
    """Return a step of a module with shards on a plain copy with the whole parameters, see `Snapshot.whole`.

    Args:
        seen: from a step and its optimizer to its snapshot.
        pending: the step.
        optimizer: that makes its update.
        loop: that trains.
        room: returns how many bytes the copy may take.
        has_moved: whether the step's own backward pass has moved the parameters.
    """
    step = seen(*pending.whole(optimizer, room().most))
    if loop.moves_parameters:
        step = replace(step, mismatch=step.mismatch or MOVED)
    return verified(step) if step.loss is None and not has_moved else step
