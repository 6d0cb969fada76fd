"""What a run has measured, for the user to read."""

from __future__ import annotations

import math
from typing import Any

from lsp_callbacks.callbacks.publisher import Stopwatch
from lsp_callbacks.callbacks.spawned_history import Mailbox, packed, unpack
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.history import History
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.nan_finder import first_fault_of
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.report import Run, Verdict, judge


class RunResults:
    """The results of a run, also in the process that called ``fit`` where the run had processes of its own.

    Args:
        monitor: that measures.
        observer: that counts the steps.
        stopwatch: that runs while something is measured.
    """

    def __init__(self, monitor: Monitor, observer: StepObserver, stopwatch: Stopwatch):
        self.monitor, self.observer, self.stopwatch = monitor, observer, stopwatch
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

    def coming_courant(self, trainer: Any) -> float:
        """Return the Courant number of the rate that the next update will use; NaN where it is not known, as here."""
        return math.nan

    @property
    def verdict(self) -> Verdict:
        """How the run went so far, or went: state, cause, evidence, advice."""
        self._bring_home()
        if self._verdict is not None:
            return self._verdict
        return judge(Run.of(self.monitor, self.observer.step, self._judges, scheduled=self.coming_courant(None)))

    def _bring_home(self) -> None:
        if (contents := self._mailbox.receive()) is not None:
            self.observer.step, self._verdict = unpack(self.monitor, contents)

    def _send_home(self, trainer: Any) -> None:
        with self.monitor.errors.warn_instead_of_raise(
            "the curves could not be sent to the process that started the run"
        ):
            self._mailbox.send(trainer, packed(self.monitor, self.observer.step, self.verdict))
