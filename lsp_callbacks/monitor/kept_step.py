"""What is kept of the coming step: a copy from which it can be replayed, or only what is read from its graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.training_loop import TrainingLoop
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.step.pending_step import PendingStep

NOT_KEPT = "the step could not be kept for a replay"


def kept_step(loop: TrainingLoop, monitor: Monitor, step: int, names: Collection[str]) -> PendingStep | None:
    """Return what is kept of a step at which something is measured, before its first forward pass; None if nothing is.

    Args:
        loop: that trains.
        monitor: that measures.
        step: number of the optimizer step.
        names: of the quantities that are measured at it.
    """
    if not loop.has_backward():
        return None
    try:
        measured = [quantity for name, quantity in monitor.quantities.items() if name in names]
        readers = {q.name: reader for q in measured if (reader := q.reader(loop.module, loop.run, step)) is not None}
        in_shards = loop.run.shards is not None  # a reader sees weights that are gone again
        is_replayed = in_shards or _needs_replay(monitor, measured) or not loop.can_do_without_replay
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


def _needs_replay(monitor: Monitor, measured: Iterable[Quantity]) -> bool:
    """Return whether a measurement of some quantities, or of their price or memory, takes a replay."""
    budget = monitor.budget
    return any(
        quantity.needs_replay
        or quantity.name not in budget.predicted
        or (budget.work is None and monitor.cadence.wants_price(quantity.name))
        for quantity in measured
    )
