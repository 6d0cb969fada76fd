"""Steps at which nothing is measured: of all hooks of a batch only the last is called."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor

from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import hide_hooks, show_hooks
from lsp_callbacks.callbacks.lightning_loop import LightningLoop
from lsp_callbacks.callbacks.loss_feed import LossFeed
from lsp_callbacks.callbacks.lr_forecast import LRForecast
from lsp_callbacks.monitor.losses import TOGETHER
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.quantities.numerics.numerics import Numerics
from lsp_callbacks.step.step_loss import StepLoss

#: Those of a callback that measures which have nothing to do meanwhile.
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step")


class Rest:
    """The steps from one that is not measured to the next that may be, in a plain run.

    Meanwhile Lightning passes over the callback's hooks but the last of a batch. There the step is counted, its loss
    waits for that of a fifth step, and the rate that comes next is compared with a number. A loss that is not usual and
    a rate that rises above a limit are looked at at once. This changes nothing but the time: what a step costs beside
    the training is for the most part how much code it comes by, none of which is in the processor's cache after the
    passes of a step. So there are few functions here.

    A rest ends at the step at which the next measurement may start, with a rate near the edge of stability, and with
    the epoch, as rates and accumulation may become others there.

    Args:
        callback: whose hooks are passed over.
        observer: that counts the steps.
        forecast: of the rates.
        feed: of the losses.
        loop: of Lightning, which calls the optimizer or not.
        is_one: whether each batch is a step of one optimizer.

    Attributes:
        is_on: whether the callback rests.
    """

    def __init__(
        self,
        callback: Callback,
        observer: StepObserver,
        forecast: LRForecast,
        feed: LossFeed,
        loop: LightningLoop,
        *,
        is_one: bool,
    ):
        self._callback, self._observer, self._forecast, self._feed = callback, observer, forecast, feed
        monitor = observer.monitor
        self._cadence, self._losses = monitor.cadence, monitor.losses
        is_called = is_one and loop.is_automatic and loop.scaler is None and not loop.overrides_step
        # Plain is a batch that is a step which Lightning calls, and of which nothing is recorded.
        self._is_plain = is_called and monitor.trace is None and Numerics.name not in monitor.quantities
        self._last: float = -1  # step before the next that may be measured
        self._most_loss = self._most_rate = -math.inf  # above which a step is looked at
        self._group: dict[str, Any] = {}
        self.end()

    def begin_after(self, trainer: Any) -> None:
        """Begin to rest after a step, at its end, if it was a plain one and nothing of it is still to be looked at."""
        observer = self._observer
        if self._is_plain and observer.updates == 1 and observer.is_settled and observer.probes.full:
            self._ask(trainer)
            self._go_on(trainer)
            if self.is_on:
                observer.forget_step()
                observer.is_idle = True
                hide_hooks(self._callback, HOOKS)

    def end(self) -> None:
        """Rest no more."""
        self.is_on = False
        show_hooks(self._callback, HOOKS)

    def end_step(self, trainer: Any, outputs: Any) -> int:
        """Count a step at its end, look at its loss, and return its number.

        Args:
            trainer: Lightning's.
            outputs: that Lightning has made of what ``training_step`` has returned.
        """
        observer, loss = self._observer, outputs.get("loss") if type(outputs) is dict else None
        step = observer.step
        observer.step = step + 1
        if isinstance(loss, Tensor) and loss.is_cpu and not loss.ndim:
            observer.previous = step
            number = loss.item()
            if (
                -sys.float_info.max <= number <= self._most_loss
                and step < self._last
                and step % TOGETHER
                and self._group["lr"] <= self._most_rate
            ):
                self._losses.waiting.append((step, number, False))
                return step
        self._look(trainer, step, loss)
        return step

    def _look(self, trainer: Any, step: int, loss: Any) -> None:
        """Look at a step, its loss and the rate that comes next as at any other."""
        # Lightning counts a step without a loss. A gradient that was set to zero, not to None, moves what has momentum.
        if isinstance(loss, Tensor) or any(p.grad is not None for p in trainer.lightning_module.parameters()):
            self._observer.previous = step
        step_loss = StepLoss()
        step_loss.add_returned(loss)
        self._feed.end_step(trainer, step, step_loss)
        self._go_on(trainer)
        if not self.is_on:
            self.end()

    def _ask(self, trainer: Any) -> None:
        """Ask after a measurement what comes next, as the next step would, at once; not where rates may change between.

        They are stepped with the batch by now, but with the epoch after its last batch.
        """
        loop = trainer.fit_loop.epoch_loop
        if self._feed.has_same_rates and loop.batch_idx + 1 < trainer.num_training_batches:
            self._cadence.due(self._observer.step, scheduled=self._forecast.scheduled_courant())

    def _go_on(self, trainer: Any) -> None:
        """Find out whether the next step may be passed over, and the least loss and rate that are looked at."""
        step, cadence, groups = self._observer.step, self._cadence, trainer.optimizers[0].param_groups
        is_due = step >= cadence.next_step or self._forecast.scheduled_courant() >= cadence.wake
        self.is_on = not is_due and trainer.accumulate_grad_batches == 1
        self._most_loss, self._most_rate, self._last = -math.inf, math.inf, cadence.next_step - 1
        is_each_shown = self._feed.is_shared or self._feed.listeners  # also a step that is nothing special
        if len(groups) == 1 and not is_each_shown:
            self._group, self._most_loss = groups[0], self._losses.usual
            if math.isfinite(critical := self._forecast.critical.mean):
                # The rate that was looked at now is nothing new.
                critical /= self._forecast.scale  # of the schedule
                # The least Courant number of a coming rate at which somebody wants to be shown a step.
                least = min((subscriber.least_courant for subscriber in self._feed.subscribers), default=math.inf)
                looked_at = max(float(groups[0]["lr"]), critical * least)
                self._most_rate = min(critical * cadence.wake, looked_at)
