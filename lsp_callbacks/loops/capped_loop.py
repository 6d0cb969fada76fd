"""The cap on the learning rates of a loop of one's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from lsp_callbacks._validation import number
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.capped_updates import CappedUpdates, rates_of
from lsp_callbacks.monitor.courant_source import COURANT, PREFERENCE
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.operators.trajectory.update_rules import rule_with_edge

#: Steps after which a reading is too old to begin to cap with.
MAX_AGE = 200
NO_LOSS = "cap={safety:g} goes by the loss of each step: call watch.record(loss) after each backward pass"


class CappedLoop(CappedUpdates):
    """The rates of a `Watch` with a cap: see `RateCap` for its rules.

    Args:
        safety: share of the critical rate that is allowed.
        observer: of the steps.
        optimizer: that makes them.

    Raises:
        ValueError: for an optimizer without ``lr`` or without a critical rate.
    """

    def __init__(self, safety: float, observer: StepObserver, optimizer: torch.optim.Optimizer):
        number("cap", safety, above=0, instead=", as a share of the critical rate, or None")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"cap={safety:g}: {type(optimizer).__name__} has no learning rate 'lr' that could be capped"
            )
        try:
            rule_with_edge(optimizer)
        except Unmeasurable as error:
            raise ValueError(f"cap={safety:g}: {error}") from error
        super().__init__(safety, MAX_AGE)
        self._observer, self._optimizer, self._is_warned = observer, optimizer, False

    def lower_next(self) -> None:
        """Lower the rates of the update that comes now, once.

        Raises:
            ValueError: where its loss was not recorded, or `stability/courant` is never measured.
        """
        observer, monitor, safety = self._observer, self._observer.monitor, self.cap.safety
        if observer.step_loss.differentiated is None:
            raise ValueError(NO_LOSS.format(safety=safety))
        if COURANT not in monitor.keys or not monitor.keys & {*PREFERENCE}:
            raise ValueError(f"cap={safety:g} needs {COURANT}, which is never measured here: measure sharpness")
        step, last = observer.step, self.steps[-1] if self.steps else None
        if last is not None and last.step == step:  # measured before the optimizer was called
            return
        rates = rates_of(self._optimizer)
        is_known = self.cap.limits and not monitor.invalidated
        factor = self.cap.factor(rates, step=step) if is_known else 1.0
        if factor == 1 and is_known and self.cap.is_exceeded(rates) and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"cap={safety:g}: the learning rate of step {step} is above the cap by the last reading, of step "
                f"{self.cap.step}, which is too old: it is not lowered before the next one",
                stacklevel=3,
            )
        self.lower(self._optimizer, step, factor)

    def read(self, observations: Sequence[Observation]) -> list[Observation]:
        """Take in what an update has completed, and return it with the rates of its step."""
        monitor = self._observer.monitor
        shown = [monitor.history.add(each, self.shown(each.step)) for each in observations]
        if observations:
            losses = monitor.losses
            losses.settle()
            for each in observations:
                self.take(monitor, each, losses.last if losses.count else 0.0)
            self.want_reading(monitor)
        return shown

    def close(self) -> None:
        """Put the rates back, and ask for no more readings."""
        self.lowered.close()
        self._observer.monitor.cadence.want(math.inf)
