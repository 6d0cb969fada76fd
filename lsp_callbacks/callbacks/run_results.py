"""What a run has measured, for the user to read, and for those who are told of it."""

from __future__ import annotations

import math
from typing import Any

from lsp_callbacks.callbacks.loss_feed import LossFeed
from lsp_callbacks.callbacks.lr_forecast import LRForecast
from lsp_callbacks.callbacks.publisher import Publisher
from lsp_callbacks.callbacks.spawned_history import Mailbox, packed, unpack
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.history import Completed, History
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.nan_finder import first_fault_of
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.report import Run, Verdict, judge
from lsp_callbacks.step.ranks import Ranks


class RunResults:
    """The results of a run, also in the process that called ``fit`` where the run had processes of its own.

    Args:
        monitor: that measures.
        observer: that counts the steps.
        publisher: that shows what was measured.

    Attributes:
        stopwatch: that runs while something is measured.
        forecast: of the learning rates to come.
        sub_batch: how many samples a measurement uses; None is the whole batch.
        save_vectors: whether checkpoints hold the vectors of what is under way.
    """

    def __init__(self, monitor: Monitor, observer: StepObserver, publisher: Publisher):
        self.monitor, self.observer, self.stopwatch = monitor, observer, publisher.stopwatch
        self.forecast, self._publisher = LRForecast(), publisher
        self.sub_batch: int | None = None
        self.save_vectors = False
        self._loss_feed = LossFeed(monitor, Ranks())  # another one when training begins
        #: ArrivedLoss of each observation and of the end of each step: `StopOnInstability`.
        self.subscribers: list[Any] = []
        #: Called with each observation, once all others have it; they decide nothing.
        self.reading_listeners: list[Any] = []
        #: Lowers the rate of single updates: `CapLearningRate`.
        self.cap: Any = None
        #: Scales the rates of all updates: `RollBackOnInstability`.
        self.roll_back: Any = None
        #: Called with the number of each step and the loss that its micro-batches returned.
        self.loss_listeners: list[Any] = []
        self._judges: list[Any] = []  # they leave the subscribers when training ends
        self._mailbox = Mailbox()
        self._verdict: Verdict | None = None  # of a run in other processes, which knew more than comes home

    def _begin_results(self) -> None:
        self._judges, self._verdict = list(self.subscribers), None

    @property
    def step(self) -> int:
        """Number of the optimizer step that comes next."""
        self._bring_home()
        return self.observer.step

    @property
    def history(self) -> History:
        """Steps and values of every key; after ``ddp_spawn`` and its like also in the process that called ``fit``."""
        self._bring_home()
        return self.monitor.history

    @property
    def skipped(self) -> dict[str, str]:
        """Why quantities are not measured in this run, or not yet, by their names."""
        self._bring_home()
        return self.monitor.skipped

    @property
    def paths(self) -> dict[str, str]:
        """By which way each quantity was last measured, see `Monitor`."""
        self._bring_home()
        return self.monitor.paths

    @property
    def courant_source(self) -> str | None:
        """Which number ``stability/courant`` is, for the whole run; None before it is decided.

        "courant_mean_square", "courant_sgd" or "courant_gd".
        """
        self._bring_home()
        return self.monitor.courant.name

    @property
    def fault(self) -> Fault | None:
        """What made the first NaN or Inf of the run, where "numerics" is among the quantities."""
        return first_fault_of(self.monitor)

    @property
    def overhead(self) -> float:
        """Measured share of the time since training began that went into measuring."""
        return self.stopwatch.share

    def scheduled_courant(self, trainer: Any) -> float:
        """Return the rate that the schedule brings next over the critical rate; NaN if not known."""
        return self.forecast.scheduled_courant() if self.has_same_rates else math.nan

    def coming_courant(self, trainer: Any) -> float:
        """Return the same of the rate that the next update will use, which a `CapLearningRate` may lower."""
        return self.forecast.factor(self.cap) * self.scheduled_courant(trainer)

    def rates(self) -> tuple[float, float]:
        """Return the rates that the next update will use, and the last measured one has used; NaN if not known."""
        if not self.has_same_rates:
            return math.nan, math.nan
        coming, used = self.forecast.rates()
        return self.forecast.factor(self.cap) * coming, used

    @property
    def has_same_rates(self) -> bool:
        """Whether all processes have had the same learning rates, as far as that is known."""
        return self._loss_feed.has_same_rates

    @property
    def verdict(self) -> Verdict:
        """How the run went so far, or went: state, cause, evidence, advice."""
        self._bring_home()
        if self._verdict is not None:
            return self._verdict
        return judge(Run.of(self.monitor, self.observer.step, self._judges, scheduled=self.coming_courant(None)))

    def _publish(self, trainer: Any, completed: Completed) -> None:
        """Show what a step has completed."""
        sub_batch = None if self.sub_batch is None else self.observer.sub_batch or 0
        for observation in completed.observations:
            self._publisher.measured_at = observation.step
            try:
                observation = self.forecast.look_ahead(trainer, self.monitor, observation, self.observer.step)
            except Exception as error:
                self.monitor.errors.caught("the coming learning rates could not be computed", error)
            if self.cap is not None:
                observation = self.monitor.history.add(observation, self.cap.rates_of(observation.step))
                self.cap.receive(trainer, observation)
            self._publisher.publish(trainer, observation, sub_batch=sub_batch)
            for subscriber in self.subscribers:
                subscriber.receive(trainer, observation)
            for listener in self.reading_listeners:
                listener(observation)
        if completed.fault is not None:
            self._publisher.publish(trainer, completed.fault, sub_batch=sub_batch)

    def state_dict(self) -> dict[str, Any]:
        monitor = self.monitor.state_dict(vectors=self.save_vectors)
        return {"step": self.observer.step, **self.forecast.state_dict(), "monitor": monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.observer.step = int(state_dict.get("step", 0))  # 0 is taken from the trainer
        self.forecast.load_state_dict(state_dict)
        self.monitor.load_state_dict(state_dict.get("monitor", {}))

    def _bring_home(self) -> None:
        if (contents := self._mailbox.receive()) is not None:
            self.observer.step, self._verdict = unpack(self.monitor, contents)

    def _send_home(self, trainer: Any) -> None:
        with self.monitor.errors.warn_instead_of_raise(
            "the curves could not be sent to the process that started the run"
        ):
            self._mailbox.send(trainer, packed(self.monitor, self.observer.step, self.verdict))
