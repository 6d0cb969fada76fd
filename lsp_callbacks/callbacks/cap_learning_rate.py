"""The callback that keeps the learning rate below the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import BATCH_HOOKS, hide_hooks, show_hooks
from lsp_callbacks.callbacks.publisher import show
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor, monitor_among, monitor_beside
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.capped_updates import CappedUpdates, rates_of, relative_rates
from lsp_callbacks.monitor.courant_source import COURANT, PREFERENCE
from lsp_callbacks.monitor.critical_rate import critical_rate
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.losses import ArrivedLoss
from lsp_callbacks.monitor.preview import preview
from lsp_callbacks.operators.trajectory.update_rules import rule_with_edge


class CapLearningRate(Callback):
    """Keeps the learning rate of each update below ``safety`` times the critical one, and the schedule as it is.

    The critical rate is the one at which ``stability/courant`` would be 1, by the last readings of the
    `StabilityMonitor` beside it, see `RateCap`. Where the scheduled rate of a step is above ``safety`` times it, all
    parameter groups are multiplied by one factor for this update alone: before the optimizer's step, and put back right
    after it, so that schedulers, checkpoints and ``LearningRateMonitor`` know only the user's own rate. As soon as
    schedule or readings allow it, the step is again the user's own, to the last bit.

    It falls at once and rises step by step, begins at a tenth of the cap before the loss has fallen, and leaves a rate
    alone at which the run was measured stable while its loss fell; see `RateCap` for these rules. So much healthy
    training at the edge of stability is never capped; a run that was capped before its loss had fallen trusts no rate.

    A cap holds from the step after a reading to the next one; none begins with a reading that is more than ``max_age``
    steps old, as after a pause in which nothing could be measured. It then warns once. While a cap is on, or the
    critical rate falls towards the rate, readings are wanted beside the monitor's budget: on a credit of 60 steps of
    training, which comes back as the budget does. The first reading is taken twice, once before the rate of its own
    update is set, so that the very first update is capped, too, where its number can be told then. A measurement that
    failed (NaN), or one that stands in for the headline number, changes nothing; one of a step whose loss has exploded
    (above three times the one at the start), or of a network that has collapsed, can lower the cap and not lift it: a
    saturated softmax has no curvature.

    What is measured is the step at the rate that it really uses. Each reading says ``stability/lr_scheduled`` and
    ``stability/lr_applied``, the largest of the groups, and ``stability/lr_cap``, what the first of them was compared
    with; so do the loggers where a cap begins and ends, and at every ``log_every_n_steps``-th capped step.
    ``stability/steps_to_edge`` is that of the schedule. `StopOnInstability` judges the rates that are used.

    Args:
        safety: share of the critical rate that is allowed.
        max_age: steps after which a reading is too old to begin to cap with.
        verbose: print the first cap, and how many there were.

    Raises:
        ValueError: for bad arguments; before training, without a `StabilityMonitor`, with two of these callbacks, under
            manual optimisation, with a ``prox``, where ``stability/courant`` cannot be measured or is measured more
            seldom than once in ``max_age`` steps, and for an optimizer without ``lr`` or without a critical rate.

    Attributes:
        first_step: of a capped update; None before it.
        capped: number of capped updates.

    Example:
        >>> from lsp_callbacks import CapLearningRate, StabilityMonitor
        >>> callbacks = [StabilityMonitor(), CapLearningRate(safety=0.9)]  # for Trainer(callbacks=callbacks)
    """

    #: A coming rate is no reason to look at a step at its end: that is done before its update.
    least_courant = math.inf

    def __init__(self, safety: float = 0.9, *, max_age: int = 200, verbose: bool = True):
        number("safety", safety, above=0, instead=", as a share of the critical rate")
        if not math.isfinite(safety):
            raise ValueError(f"safety={safety!r}: give a finite share of the critical rate, such as 0.9")
        whole("max_age", max_age, 1, instead=" steps")
        self.safety, self.max_age, self.verbose = safety, max_age, verbose
        self._updates = CappedUpdates(safety, max_age)
        self._cap = self._updates.cap
        self._reset()

    def _reset(self) -> None:
        self._updates.reset()
        self.first_step: int | None = None
        self.capped = 0
        self._since = 0  # capped updates since the last one that was logged
        self._received: list[Observation] = []
        self._is_checked = self._is_warned = False

    # -- before training -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        source = monitor_beside("CapLearningRate", trainer)
        if sum(isinstance(c, CapLearningRate) for c in trainer.callbacks) > 1:
            raise ValueError("two CapLearningRate: give Trainer(callbacks=[...]) the one with the lower safety")
        if not pl_module.automatic_optimization:
            raise ValueError(
                "CapLearningRate with automatic_optimization=False: when the optimizer steps is up to training_step; "
                "limit the rate there, by trainer.callback_metrics['stability/courant']"
            )
        if source.prox is not None:
            raise ValueError(
                "CapLearningRate with StabilityMonitor(prox=...): the map after the step reads the scheduled rate, and "
                "would not be that of the step any more; leave one of the two out"
            )
        self._check_keys(source)
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self._reset()
        self._source, source.cap = source, self
        hide_hooks(self, (hook for hook in BATCH_HOOKS if hook != "on_before_optimizer_step"))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._is_checked = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Not on_train_start: the monitor's own may come later, where it finds out what cannot be measured.
        if not self._is_checked:
            self._is_checked = True
            self._check_keys(self._source)
            self._check_optimizer(trainer)
        elif not self._source.monitor.keys & {*PREFERENCE} and not self._is_warned:
            self._is_warned = True
            rank_zero_warn(f"CapLearningRate makes no new cap: {COURANT} is not measured any more")

    def _check_keys(self, source: StabilityMonitor) -> None:
        monitor = source.monitor
        if COURANT not in monitor.keys or not monitor.keys & {*PREFERENCE}:
            reasons = "; ".join(f"{name}: {why}" for name, why in monitor.skipped.items())
            raise ValueError(
                f"CapLearningRate needs {COURANT}, which is never measured here ({reasons or 'not asked for'}): let "
                "StabilityMonitor measure mean_square_stability, sgd_stability or sharpness"
            )
        pace = monitor.cadence.paces.get(monitor.headline or "")
        if pace is not None and pace.every_n_steps is not None and pace.every_n_steps > self.max_age:
            raise ValueError(
                f"max_age={self.max_age}: {COURANT} is measured every {pace.every_n_steps} steps only, so that each "
                "reading would be too old; measure it more often, or allow a larger age"
            )

    def _check_optimizer(self, trainer: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"CapLearningRate needs one optimizer, and there are {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no learning rate 'lr' that could be capped")
        try:
            rule_with_edge(optimizer)
        except Unmeasurable as error:
            raise ValueError(f"CapLearningRate: {error}") from error

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        show_hooks(self)
        self._updates.lowered.close()
        source = monitor_among(trainer.callbacks)
        if source is not None and source.cap is self:
            source.cap = None
            source.monitor.cadence.want(math.inf)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._updates.lowered.close()

    # -- one step ------------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if self._source.rests:  # otherwise the monitor asks, before it measures
            self.lower(trainer, optimizer)

    def lower(self, trainer: Any, optimizer: torch.optim.Optimizer) -> float | None:
        """Set the rates of the update that comes now, and return the largest that was scheduled.

        Called by the `StabilityMonitor` at steps at which something may be measured, in either order of the callbacks.

        Args:
            trainer: Lightning's.
            optimizer: that makes the update.
        """
        cap, step = self._cap, self._source.observer.step
        if not cap.limits and self._source.observer.is_idle and self._source.forecast.scale == 1:
            return None
        scale, was_on = self._source.forecast.scale, cap.is_on
        scheduled = max(rates_of(optimizer))
        at = self._updates.lower(optimizer, step, self.factor(optimizer), scale)
        if cap.is_on:
            self.capped += 1
            self._since = self._since + 1 if was_on else 0
            if self.first_step is None:
                self.first_step = step
                self._say(
                    f"the scheduled learning rate {max(at.rates):.4g} is capped at {max(at.used):.4g} from step "
                    f"{step} on: {self.safety:g} times the critical one, measured at step {cap.step}"
                )
        if cap.is_on != was_on or (cap.is_on and not self._since % max(1, trainer.log_every_n_steps)):
            show(trainer, self.rates_of(step))
        return scheduled

    def foresee(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in what the headline number of the first measured step will be, before its update."""
        if self._cap.limits:
            return
        observer = self._source.observer
        loop = observer.loop
        values = preview(self._source.monitor, loop.module, lambda: observer.snapshot(optimizer))
        key = next((key for key in PREFERENCE if key in values), "")
        rates = rates_of(optimizer)
        critical = critical_rate(values, used=max(rates), key=key)
        if not math.isnan(critical):
            self._cap.add(observer.step, critical=critical, relative=relative_rates(optimizer, rates))

    def factor(self, optimizer: torch.optim.Optimizer) -> float:
        """Return by what the rates of the next update will be multiplied."""
        if not self._cap.limits:
            return 1.0
        scale = self._source.forecast.scale
        return self._factor([scale * rate for rate in rates_of(optimizer)])

    def _factor(self, rates: Sequence[float]) -> float:
        source, cap = self._source, self._cap
        if not cap.limits or source.monitor.invalidated or not source.has_same_rates:
            return 1.0
        step = source.observer.step
        factor = cap.factor(rates, step=step)
        if factor == 1 and cap.is_exceeded(rates) and not self._is_warned:
            self._is_warned = True
            rank_zero_warn(
                f"CapLearningRate: the learning rate {max(rates):.4g} of step {step} is above the cap by the last "
                f"reading, of step {cap.step}, which is too old (max_age={self.max_age}): it is not lowered before the "
                "next one"
            )
        return factor

    def rates_of(self, step: int) -> dict[str, float]:
        """Return the scheduled and the applied rate of one of the last steps, and the cap, by their keys."""
        return self._updates.shown(step)

    # -- readings ------------------------------------------------------------------------------------------------------

    def receive(self, trainer: Any, observation: Observation) -> None:
        """Take in a new observation, which waits for the loss of its step."""
        self._received.append(observation)

    def end_step(self, trainer: Any, step: int, arrived: Sequence[ArrivedLoss]) -> None:
        """Look at what was received, with the losses that are known now: the same numbers on all processes."""
        received, self._received = self._received, []
        losses = self._source.monitor.losses
        for observation in received:
            loss = next((each.loss for each in arrived if each.step == observation.step), None)
            if loss is None:
                loss = losses.last if losses.count else 0.0
            self._updates.take(self._source.monitor, observation, loss)
        if received:
            self._updates.want_reading(self._source.monitor)

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.capped:
            self._say(f"{self.capped} updates were made at a lower rate than the scheduled one")

    def _say(self, text: str) -> None:
        if self.verbose:
            rank_zero_info(f"CapLearningRate: {text}")

    def state_dict(self) -> dict[str, Any]:
        return {"cap": self._cap.state_dict(), "first_step": self.first_step, "capped": self.capped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._reset()
        self._cap.load_state_dict(state_dict["cap"])
        self.first_step, self.capped = state_dict["first_step"], state_dict["capped"]
