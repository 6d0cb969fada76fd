"""Who is told the loss of each step: the monitor's record, those who may end training, and the picture of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lsp_callbacks.callbacks.shared_losses import SharedLosses
from lsp_callbacks.monitor.losses import ArrivedLoss
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.step_loss import StepLoss


class LossFeed:
    """Gives the loss of each step to all who want it.

    The record and those who may end training are given the loss of this process, or the mean over all processes, which
    then decide alike; the listeners are given that of this process as it was returned.

    Args:
        monitor: whose ``losses`` are the record.
        ranks: the processes of the run.
        subscribers: whose ``end_step(trainer, step, arrived)`` may end training.
        listeners: called with the number of a step and its loss, which lies on its device.
        is_automatic: whether a step's loss is the one that ``training_step`` returns.

    Attributes:
        subscribers, listeners: see the arguments; those that join later are told, too.
        is_shared: whether the losses of several processes are brought together.
        has_same_rates: whether all processes have had the same learning rates, as far as that is known.
    """

    def __init__(
        self,
        monitor: Monitor,
        ranks: Ranks,
        subscribers: Sequence[Any] = (),
        listeners: Sequence[Callable[[int, Tensor], None]] = (),
        *,
        is_automatic: bool = True,
    ):
        self._monitor, self.subscribers, self.listeners = monitor, subscribers, listeners
        self._is_automatic = is_automatic
        self._shared = SharedLosses(ranks) if subscribers and ranks.world > 1 else None
        self.is_shared = self._shared is not None
        self.has_same_rates = True

    def end_step(
        self, trainer: Any, step: int, step_loss: StepLoss, *, left_out: bool = False, wait: bool = False
    ) -> None:
        """Tell the loss of a step, also of one that had none; what one process needs for that is next to nothing.

        Args:
            trainer: Lightning's.
            step: number of the step.
            step_loss: its losses.
            left_out: whether a gradient scaler left the update out.
            wait: for the losses of other processes, and look at what has arrived.
        """
        returned = step_loss.returned
        if returned is not None:
            for listener in self.listeners:
                listener(step, returned)
        differentiated = None if self._is_automatic else step_loss.differentiated
        loss = returned if differentiated is None else differentiated
        if self._shared is None:
            losses = self._monitor.losses
            arrived = losses.saw(max(step, 0), loss, left_out=left_out)
            if wait:
                arrived = [*arrived, *losses.settle()]
        else:
            lr = largest_learning_rate(trainer.optimizers[0]) if trainer.optimizers else 0.0
            arrived = self._shared.take(max(step, 0), loss, lr=lr, left_out=left_out, wait=wait)
            self._record(arrived, self._shared)
        for subscriber in self.subscribers:
            subscriber.end_step(trainer, step, arrived)

    def finish(self, step: int) -> None:
        """Wait for the losses up to ``step`` that have not arrived."""
        if self._shared is None:
            self._monitor.losses.saw(max(step, 0), None, wait=True)
        else:
            self._record(self._shared.rest(), self._shared)

    def _record(self, arrived: Sequence[ArrivedLoss], shared: SharedLosses) -> None:
        for loss in arrived:
            self._monitor.losses.add(loss)
        self.has_same_rates = shared.same_rates
        if not self.has_same_rates:
            self._monitor.errors.warn_once(
                "the learning rates of the processes differ, so that the rate that the schedule brings next is neither "
                "looked at nor capped: give all of them the same (a metric that a scheduler watches needs "
                "sync_dist=True)"
            )
