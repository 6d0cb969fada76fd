"""A step of a module with shards, as the quantities see it that need its whole parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lsp_callbacks.monitor.training_loop import TrainingLoop
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.room import Room
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.verified_step import verified

MOVED = (
    "code of yours moves the parameters together with the optimizer (optimizer_step, prox), which is not followed "
    "where each process holds a shard of them"
)


def with_whole_step(
    seen: Callable[[PendingStep, torch.optim.Optimizer], Snapshot],
    pending: PendingStep,
    optimizer: torch.optim.Optimizer,
    loop: TrainingLoop,
    room: Callable[[], Room],
    *,
    is_settled: bool,
) -> Snapshot:
    """Return a step that can be seen on a plain copy with the whole parameters, too; see `Snapshot.whole`.

    Args:
        seen: from a step and its optimizer to its snapshot.
        pending: the step.
        optimizer: that makes its update.
        loop: that trains.
        room: returns how many bytes the copy may take.
        is_settled: whether the step's own backward pass has moved the parameters.
    """
    snapshot = seen(pending, optimizer)
    if loop.run.shards is None or not pending.can_replay:
        return snapshot

    def whole() -> Snapshot:
        step = seen(*pending.whole(optimizer, room().most))
        if loop.moves_parameters:
            step = replace(step, mismatch=step.mismatch or MOVED)
        return verified(step) if step.loss is None and not is_settled else step

    return replace(snapshot, whole_step=whole)
