"""The callback that keeps the learning rate below the edge of stability."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import BATCH_HOOKS, hide_hooks, show_hooks
from lsp_callbacks.callbacks.lr_forecast import critical_rate
from lsp_callbacks.callbacks.publisher import log
from lsp_callbacks.callbacks.rate_cap import RateCap
from lsp_callbacks.callbacks.rates_of_update import RatesOfUpdate
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor, monitor_among, monitor_beside
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.courant_source import COURANT, PREFERENCE
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.losses import FALLEN, SMOOTHING, ArrivedLoss
from lsp_callbacks.monitor.preview import preview
from lsp_callbacks.operators.trajectory.update_rules import rule_with_edge

CAP, SCHEDULED, APPLIED = (f"stability/lr_{which}" for which in ("cap", "scheduled", "applied"))
#: Steps whose rates are kept, for readings that are complete some steps later.
KEPT = 64


class CappedStep(NamedTuple):
    """Rates of one of the last updates.

    Attributes:
        step: its number.
        rates: of the groups, by the schedule.
        relative: the same, relative to the highest.
        factor: by which all were multiplied.
    """

    step: int
    rates: list[float]
    relative: list[float]
    factor: float

    @property
    def used(self) -> list[float]:
        """The rates that the update has used."""
        return [rate * self.factor for rate in self.rates]


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
        self._cap, self._lowered = RateCap(safety, max_age), RatesOfUpdate()
        self._reset()

    def _reset(self) -> None:
        self._cap.reset()
        self.first_step: int | None = None
        self.capped = 0
        self._since = 0  # capped updates since the last one that was logged
        self._received: list[Observation] = []
        self._steps: deque[CappedStep] = deque(maxlen=KEPT)
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
        self._lowered.close()
        source = monitor_among(trainer.callbacks)
        if source is not None and source.cap is self:
            source.cap = None
            source.monitor.cadence.want(math.inf)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._lowered.close()

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
        scale, scheduled = self._source.forecast.scale, _rates(optimizer)
        rates = [scale * rate for rate in scheduled]
        factor, was_on = self._factor(rates), cap.is_on
        cap.is_on = factor < 1
        cap.note(step, [rate * factor for rate in rates])
        self._steps.append(CappedStep(step, rates, _relative(optimizer, rates), factor))
        if factor * scale != 1:
            self._lowered.multiply(optimizer, factor * scale)
        if cap.is_on:
            self.capped += 1
            self._since = self._since + 1 if was_on else 0
            if self.first_step is None:
                self.first_step = step
                self._say(
                    f"the scheduled learning rate {max(rates):.4g} is capped at {max(rates) * factor:.4g} from step "
                    f"{step} on: {self.safety:g} times the critical one, measured at step {cap.step}"
                )
        if cap.is_on != was_on or (cap.is_on and not self._since % max(1, trainer.log_every_n_steps)):
            self._show(trainer, self.rates_of(step))
        return max(scheduled)

    def foresee(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in what the headline number of the first measured step will be, before its update."""
        if self._cap.limits:
            return
        observer = self._source.observer
        loop = observer.loop
        values = preview(self._source.monitor, loop.module, lambda: observer.snapshot(optimizer))
        key = next((key for key in PREFERENCE if key in values), "")
        rates = _rates(optimizer)
        critical = critical_rate(values, used=max(rates), key=key)
        if not math.isnan(critical):
            self._cap.add(observer.step, critical=critical, relative=_relative(optimizer, rates))

    def factor(self, optimizer: torch.optim.Optimizer) -> float:
        """Return by what the rates of the next update will be multiplied."""
        if not self._cap.limits:
            return 1.0
        scale = self._source.forecast.scale
        return self._factor([scale * rate for rate in _rates(optimizer)])

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
        if (at := self._step_at(step)) is None:
            return {}
        largest = self._cap.largest(at.rates)
        shown = {CAP: largest} if math.isfinite(largest) else {}
        return shown | {SCHEDULED: max(at.rates), APPLIED: max(at.used)}

    def _step_at(self, step: int) -> CappedStep | None:
        return next((each for each in self._steps if each.step == step), None)

    def _show(self, trainer: Any, values: Mapping[str, float]) -> None:
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        log(trainer, values)

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
            at = self._step_at(observation.step)
            critical = math.nan if at is None else self._critical(observation, at)
            if at is None or math.isnan(critical):
                continue
            is_broken = not math.isfinite(loss) or losses.exploded(loss)
            is_broken |= observation.values.get("stability/collapsed", 0.0) > 0
            has_fallen = losses.count >= SMOOTHING and losses.smoothed <= FALLEN * losses.start
            self._cap.add(
                at.step, critical=critical, relative=at.relative, used=at.used, was_capped=at.factor < 1,
                only_lower=is_broken, is_falling=has_fallen and losses.is_calm, has_risen=losses.risen or is_broken,
            )  # fmt: skip
        if received and self._steps:
            self._source.monitor.cadence.want(self._cap.next_reading(self._steps[-1].rates))

    def _critical(self, observation: Observation, at: CappedStep) -> float:
        """Return the critical rate by the headline number of an observation; NaN if it has none."""
        values, key = observation.values, self._source.monitor.courant.key or ""
        courant = values.get(COURANT, math.nan)
        # A headline number may be that of an earlier step, at which it was not known that it would be this one.
        if math.isnan(courant) or values.get(key) != courant:
            return math.nan
        return critical_rate(values, used=max(at.used), key=key)

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


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _relative(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> list[float]:
    """Return the rates of the groups, relative to the largest; by ``initial_lr`` where a warm-up begins at 0."""
    if not any(rates):
        rates = [float(group.get("initial_lr", 1.0)) for group in optimizer.param_groups]
    largest = max(rates) or 1.0
    return [rate / largest for rate in rates]
