"""The learning rates that the schedule will bring, from a copy of it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lsp_callbacks.step.flat import largest_learning_rate

#: Measurements whose mean is the critical rate.
RECENT = 3
#: Steps left where nobody knows.
MANY = 2**62


class CriticalRate:
    """The last critical learning rates, with whose mean a scheduled rate is compared.

    Args:
        known: of an earlier run.
        stochastic: whether those were of SGD itself, not of one batch's curvature.
    """

    def __init__(self, known: Sequence[float] = (), stochastic: bool = False):
        self.known, self.stochastic = list(known), stochastic

    @property
    def mean(self) -> float:
        """NaN before there is one."""
        return sum(self.known) / len(self.known) if self.known else math.nan

    def take(self, values: Mapping[str, float], *, used: float) -> bool:
        """Takes in a measurement at the rate ``used``; whether it had a critical rate."""
        if "stability/critical_lr" in values and not self.stochastic:  # before, it was that of one batch's curvature
            self.known, self.stochastic = [], True
        courant = math.nan if self.stochastic else values.get("stability/courant", math.nan)
        critical = values.get("stability/critical_lr", used / courant if courant > 0 else math.nan)
        if not math.isfinite(critical):
            return False
        self.known = [*self.known, critical][-RECENT:]
        return True

    def crossing(self, rates: Sequence[float]) -> int | None:
        """The first of the rates that is above the critical one."""
        return next((k for k, future in enumerate(rates) if future > self.mean), None)


class Schedule:
    """Rates of the steps to come. The trainer's own schedulers are never touched; each future step is computed once.

    Schedulers that wait for a metric (``ReduceLROnPlateau``) are taken to leave the rate alone.

    Args:
        trainer: Lightning's, during training.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        #: Whether the rate was what was foreseen when it was last looked at.
        self.confirmed = False
        self._origin = 0
        self._rates: list[float] = []

    def ahead(self, step: int, horizon: int) -> list[float]:
        """The rates of steps ``step`` to ``step + horizon - 1``; called at the end of the batch before ``step``."""
        now = largest_learning_rate(self._trainer.optimizers[0])
        known = self._rates[step - self._origin : step - self._origin + 1]
        between = self._trainer.fit_loop.epoch_loop.batch_idx + 1 >= self._trainer.num_training_batches
        self.confirmed = bool(known) and abs(known[0] - now) <= 1e-6 * abs(now)
        if not known or (not between and abs(known[0] - now) > 1e-6 * abs(now)):  # somebody else set the rate
            self._restart(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "step of the optimizer was not called": it never will be
            while len(self._rates) < step - self._origin + horizon:
                self._advance()
        return self._rates[step - self._origin : step - self._origin + horizon]

    def _restart(self, step: int) -> None:
        self._origin = step
        trainer = self._trainer
        optimizer = trainer.optimizers[0]
        # The weights and the state are shared, not copied; so is the module, whose methods may be the schedule.
        memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        memo |= {id(trainer): trainer, id(trainer.lightning_module): trainer.lightning_module}
        memo[id(optimizer.state)] = {}
        configs = [
            config
            for config in trainer.lr_scheduler_configs
            if config.scheduler.optimizer is optimizer and not config.reduce_on_plateau
        ]
        self._optimizer, copies = copy.deepcopy((optimizer, [config.scheduler for config in configs]), memo)
        self._copies = list(zip(configs, copies))
        # Lightning has already moved the schedulers that step with the batch.
        self._done, self._epoch = trainer.fit_loop.epoch_loop.batch_idx + 1, trainer.current_epoch
        self._end_epoch()
        self._rates = [largest_learning_rate(self._optimizer)]

    def _advance(self) -> None:
        # The batch that ends the next window: an epoch's last one may be short.
        window = self._trainer.accumulate_grad_batches
        self._done = min(self._done + window - self._done % window, self._trainer.num_training_batches)
        for config, scheduler in self._copies:
            if config.interval == "step" and self._done % config.frequency == 0:
                scheduler.step()
        self._end_epoch()
        self._rates.append(largest_learning_rate(self._optimizer))

    def _end_epoch(self) -> None:
        if self._done < self._trainer.num_training_batches:
            return
        self._done, self._epoch = 0, self._epoch + 1
        for config, scheduler in self._copies:
            if config.interval == "epoch" and self._epoch % config.frequency == 0:
                scheduler.step()


def steps_left(trainer: Any, step: int) -> int:
    """Optimizer steps from ``step`` to the end of training, as far as it is known; otherwise very many."""
    try:
        total = trainer.estimated_stepping_batches
    except Exception:  # where accumulation changes between epochs, Lightning refuses to tell
        total = trainer.max_steps
    return int(total) - step if 0 <= total < math.inf else MANY
