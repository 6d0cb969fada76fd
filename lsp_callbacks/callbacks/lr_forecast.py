"""When the learning rates that the schedule will bring cross the edge of stability."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lsp_callbacks.monitor.courant_source import SGD
from lsp_callbacks.monitor.critical_rate import CRITICAL, critical_rate
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.step.flat import largest_learning_rate

#: Steps of the schedule to look ahead.
HORIZON = 1000
#: Steps left where their number is not known.
MANY = 2**62
#: Readings in a mean, as everywhere.
RECENT = 3


class CriticalRate:
    """The mean of the last critical rates, with which scheduled rates are compared to forecast the edge.

    An arithmetic mean, which a single low reading does not move far: by it `StopOnInstability` decides, whose rules
    were fixed with it. What lowers rates, `RateCap`, has to follow a fall at once.

    Args:
        rates: of an earlier run.
        stochastic: whether those were of SGD itself, not of one batch's curvature.

    Attributes:
        mean: of the last ones; NaN before the first.
    """

    def __init__(self, rates: Sequence[float] = (), stochastic: bool = False):
        self.rates, self.stochastic = list(rates), stochastic
        self.mean = sum(self.rates) / len(self.rates) if self.rates else math.nan

    def add(self, values: Mapping[str, float], *, used: float) -> bool:
        """Take in a measurement at the rate ``used``; return True if it had a critical rate."""
        if CRITICAL[SGD] in values and not self.stochastic:  # before, it was that of one batch's curvature
            self.rates, self.stochastic, self.mean = [], True, math.nan
        critical = values.get(CRITICAL[SGD], math.nan) if self.stochastic else critical_rate(values, used=used)
        if not math.isfinite(critical):
            return False
        self.rates = [*self.rates, critical][-RECENT:]
        self.mean = sum(self.rates) / len(self.rates)
        return True

    def crossing(self, rates: Sequence[float], scale: float = 1.0) -> int | None:
        """Return the index of the first rate, times a factor, above the critical one; None if there is none."""
        if not scale * max(rates) > self.mean:  # nearly always, and at once
            return None
        return next((k for k, future in enumerate(rates) if scale * future > self.mean), None)


class LRForecast:
    """Compares the learning rates to come with the critical one, of the last measurements.

    Players have rates of their own, and no common schedule: of them nothing is foretold.

    Attributes:
        critical: the last critical rates.
        scale: by which all rates of the schedule are multiplied when they are used; a `RollBackOnInstability` sets it.
    """

    def __init__(self) -> None:
        self.critical, self.scale = CriticalRate(), 1.0
        self._schedule: Schedule | None = None
        self._optimizer: Any = None
        self._is_game = self._is_overridden = False
        self._rate_before = self._rate_scheduled = self._rate_used = 0.0

    def reset(self) -> None:
        """Forget the critical rates, as before a first run."""
        self.critical = CriticalRate()

    def begin_run(self, trainer: Any, *, is_game: bool, is_overridden: bool) -> None:
        """Begin to follow the schedule of a run.

        Args:
            trainer: Lightning's, when training begins.
            is_game: whether several optimizers take turns.
            is_overridden: whether the module's own ``optimizer_step`` may set rates.
        """
        self._schedule, self._is_game, self._is_overridden = Schedule(trainer), is_game, is_overridden
        self._optimizer = trainer.optimizers[0] if trainer.optimizers and not is_game else None

    def begin_step(self, trainer: Any) -> None:
        """Note the rate before the step's forward pass."""
        self._rate_before = largest_learning_rate(trainer.optimizers[0]) if self._is_overridden else 0.0

    def before_update(self, trainer: Any, *, scheduled: float | None = None) -> None:
        """Note the rate that the step uses, and the one that it was to use, if that is another."""
        self._rate_used = largest_learning_rate(trainer.optimizers[0])
        self._rate_scheduled = self._rate_used if scheduled is None else scheduled

    def rates(self) -> tuple[float, float]:
        """Return the rate of the schedule for the next update, and that of the last measured step; NaN for players."""
        if self._optimizer is None:
            return math.nan, math.nan
        return self.scale * largest_learning_rate(self._optimizer), self._rate_used

    def factor(self, cap: Any) -> float:
        """Return by what a `CapLearningRate` will multiply the rates of the next update; 1 without one."""
        return 1.0 if cap is None or self._optimizer is None else cap.factor(self._optimizer)

    def scheduled_courant(self) -> float:
        """Return the rate that the schedule gives the next update over the critical one; NaN where it is not known."""
        critical = self.critical.mean
        if self._optimizer is None or not critical > 0:
            return math.nan
        return self.scale * largest_learning_rate(self._optimizer) / critical

    def look_ahead(self, trainer: Any, monitor: Monitor, observation: Observation, step: int) -> Observation:
        """Add ``stability/steps_to_edge`` to an observation, where the schedule will cross the critical rate.

        Args:
            trainer: Lightning's.
            monitor: that made the observation.
            observation: of the last step.
            step: number of the step that comes next.
        """
        if self._is_game or not self.critical.add(observation.values, used=self._rate_used):
            return observation
        assert self._schedule is not None
        left = max(1, min(HORIZON, steps_left(trainer, step)))
        crossing = self.critical.crossing(self._schedule.ahead(step, left), self.scale)
        is_kept = self._schedule.confirmed and self._rate_scheduled == self._rate_before
        if self._is_overridden and not is_kept:  # ``optimizer_step`` sets rates of its own
            return observation
        if crossing is None or self.scale * self._rate_scheduled > self.critical.mean:
            return observation
        return monitor.history.add(observation, {"stability/steps_to_edge": crossing + 1.0})

    def state_dict(self) -> dict[str, Any]:
        """Return the last critical rates."""
        return {"critical": self.critical.rates, "stochastic": self.critical.stochastic}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.critical = CriticalRate(state.get("critical", ()), state.get("stochastic", False))


class Schedule:
    """Rates of the steps to come. The trainer's own schedulers are never touched; each future step is computed once.

    Schedulers that wait for a metric (``ReduceLROnPlateau``) are assumed to leave the rate alone.

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
        """Return the rates of steps ``step`` to ``step + horizon - 1``, at the end of the batch before."""
        now = largest_learning_rate(self._trainer.optimizers[0])
        foreseen = self._rates[step - self._origin : step - self._origin + 1]
        between = self._trainer.fit_loop.epoch_loop.batch_idx + 1 >= self._trainer.num_training_batches
        self.confirmed = bool(foreseen) and abs(foreseen[0] - now) <= 1e-6 * abs(now)
        if not foreseen or (not between and abs(foreseen[0] - now) > 1e-6 * abs(now)):  # somebody else set the rate
            self._restart(step, now)
        count = step - self._origin + horizon
        if not self._copies:
            self._rates += self._rates[-1:] * (count - len(self._rates))
        if len(self._rates) < count:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "step of the optimizer was not called": it never will be
                while len(self._rates) < count:
                    self._advance()
        return self._rates[step - self._origin : count]

    def _restart(self, step: int, now: float) -> None:
        self._origin, self._copies = step, []
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
        if configs:
            self._optimizer, copies = copy.deepcopy((optimizer, [config.scheduler for config in configs]), memo)
            self._copies = list(zip(configs, copies))
        # Lightning has already moved the schedulers that step with the batch.
        self._done, self._epoch = trainer.fit_loop.epoch_loop.batch_idx + 1, trainer.current_epoch
        self._end_epoch()
        self._rates = [largest_learning_rate(self._optimizer) if configs else now]

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
    """Return the number of optimizer steps from ``step`` to the end of training; very many where it is not known."""
    try:
        total = trainer.estimated_stepping_batches
    except Exception:  # where accumulation changes between epochs, Lightning does not tell
        total = trainer.max_steps
    return int(total) - step if 0 <= total < math.inf else MANY
