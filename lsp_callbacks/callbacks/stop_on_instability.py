"""The callback that ends training when it has become unstable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import BATCH_HOOKS, hide_hooks, show_hooks
from lsp_callbacks.callbacks.publisher import log
from lsp_callbacks.callbacks.rate_record import RateRecord
from lsp_callbacks.callbacks.setting_checks import check_watched
from lsp_callbacks.callbacks.stability_monitor import monitor_among, monitor_beside
from lsp_callbacks.callbacks.watched_number import WatchedNumber
from lsp_callbacks.monitor.courant_source import COURANT, GD, SGD
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.losses import ALARM_LASTS, ArrivedLoss, LossRecord

#: Keys that are a rate over a critical rate, and so can be known before the rate is used.
SCHEDULED = (COURANT, SGD, GD)
#: A single Courant number that is far above the edge: with losses that do not fall, no healthy run of
#: ``benchmarks/two_populations.py`` was read at more.
FAR = 6.0
#: The loss alarm does not end training while a reading that was taken since the loss began to rise is at or below this
#: share of the threshold: with a batch of 4, noise alone trips it at a Courant number of 0.6.
CALM = 0.7
#: By how much the learning rate has grown since the loss was level when the rise that goes with it is there to stay. At
#: a rate that is constant or falls, training at the edge of stability finds flatter minima, and the loss comes back:
#: no healthy run of ``benchmarks/two_populations.py`` rose while the rate grew by more than 4 %.
GROWTH = 1.1
#: Steps in which a loss that does not fall confirms readings above the threshold, as a loss that rises does.
STUCK = 150


class StopOnInstability(Callback):
    """Ends training when it has become unstable: at the step, not at the end of the epoch.

    Two levels. The *event*: the mean of the last ``patience`` new measurements is above the threshold, or all have been
    above it for ``patience_steps`` steps; when it begins it is printed, and logged as ``stability/event``. It lasts
    until nothing was above the threshold for ``patience_steps`` steps: what comes later is a new event, so that one in
    the first steps of a run hides none. The *stop*: it is still above, after two readings at least, the smoothed loss
    is 25 % above its least value so far and above 15 % of the initial loss, and this rise does not come back:

    - the learning rate has grown by 10 % since the smoothed loss was level. At a rate that is constant or falls,
      training at the edge of stability moves to flatter minima, and the loss comes down again; it cannot where the rate
      outruns it;
    - or the loss has lost 40 % of all that it had fallen since the start.

    Healthy training lives at the edge of stability for long stretches: it has events, its loss rises at times, and
    there is no stop. A NaN neither counts nor resets. Where ``stability/courant`` fails, or is not decided
    yet, ``stability/courant_gd`` stands in for it; the two have no mean. So it does where the number is at or below the
    threshold while the loss of the same step is above three times the initial one: a softmax that has exploded is
    saturated, and the Gauss-Newton matrix, from which ``courant_sgd`` comes, vanishes.

    A stop is printed, and logged as ``stability/stop``. Training ends, too, after

    - a *loss that is not finite*, whatever was measured: at that step on the CPU, on a GPU when its number has arrived,
      one step later. Several processes stop together, at most nine steps later: their losses are exchanged every fifth
      step, and where something was measured. Steps that a gradient scaler leaves out do not count, unless the loss
      itself is not finite in 25 of them in a row;
    - *one* Courant number of 6 or more, if after 60 steps the loss has not fallen by 5 %: the rate was far too high
      from the beginning;
    - a *loss alarm*, so that no run goes on longer than a plain watcher of the loss would let it: the mean of the last
      50 losses is above twice its least and above a quarter of the initial loss, and so are most of the last 10 (one
      spike is over by then), unless the rate still grows above the threshold. A reading well below the threshold (0.7
      of it), taken since the loss began to rise, says that this is noise, unless the loss is above three times the
      initial one. So does one of the last ``patience_steps`` steps before that, if the rate has not grown out of it and
      most of the last 10 losses are below the one at the start: a bad batch, which is forgotten soon;
    - readings above the threshold, in the mean as above, and a loss that has not fallen by 5 % in 150 steps;
    - losses above three times the initial one for some 200 steps, where nothing was measured since they began to rise;
    - a collapse of the network: its outputs have ceased to depend on its inputs (``stability/collapsed`` is 1, or 0.5
      and after 60 steps the loss has not fallen by 5 %, or has risen as above).

    A Courant number is a learning rate over a critical one. So the rate that the schedule brings next is compared
    *before* it is used: a jump above the edge is an event before the first bad step, and a rate above ``limit``
    critical ones ends training there, without waiting for the loss.

    Args:
        monitor: a global key of the `StabilityMonitor` beside it, in either order.
        threshold: None is 0 for exponents and gains, and 1 for Courant numbers and stiffness.
        patience: new measurements in the mean.
        patience_steps: steps after which fewer measurements suffice, if none of them is below the threshold.
        min_steps: ignore measurements before this step.
        confirm: "loss", which it does from step 30 on, or None for the bare rule without the loss.
        limit: the scheduled Courant number that is not used; None uses any.
        verbose: print forecast, event and stop.

    Raises:
        ValueError: for bad arguments; in ``setup``, without a `StabilityMonitor`, or on a key that it never measures.

    Attributes:
        events: steps at which events began.
        event_step: the first of them, or None.
        stop_step: step of the stop, or None.
        reason: why it stopped, or None.
    """

    def __init__(
        self,
        monitor: str = COURANT,
        *,
        threshold: float | None = None,
        patience: int = 3,
        patience_steps: int = 100,
        min_steps: int = 0,
        confirm: Literal["loss"] | None = "loss",
        limit: float | None = 10.0,
        verbose: bool = True,
    ):
        check_watched(monitor)
        if threshold is not None:
            number("threshold", threshold, instead=", or None")
        whole("patience", patience, 1, instead=" measurement")
        whole("patience_steps", patience_steps, 0)
        whole("min_steps", min_steps, 0)
        if confirm not in ("loss", None):
            raise ValueError(f"confirm={confirm!r}: give 'loss', or None for the bare rule")
        if limit is not None:
            number("limit", limit, above=1, instead=", a Courant number, or None")
        self.monitor, self.patience, self.patience_steps = monitor, patience, patience_steps
        self.min_steps, self.limit = min_steps, limit
        edge = 0.0 if any(kind in monitor for kind in ("lyapunov", "residual_gain")) else 1.0
        self.threshold = edge if threshold is None else threshold
        self.confirm, self.verbose = confirm, verbose
        self._is_scheduled = monitor in SCHEDULED
        #: The Courant number of a coming learning rate above which it is a reason to look at a step.
        self.least_courant = self.threshold if self._is_scheduled else math.inf
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        self.events: list[int] = []
        self._above_step = -1  # the last one
        self.stop_step: int | None = None
        self.reason: str | None = None
        self._number = WatchedNumber(self.monitor, self.patience, self.patience_steps)
        self._received: Observation | None = None  # the last one, until the loss of its step is known
        self._forecast = False
        self._collapsed = 0.0  # the last reading
        self._losses, self._shares_losses = LossRecord(), False
        self._rates = RateRecord()
        self._is_quiet = True  # no reading is anywhere near a reason to stop

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        source = monitor_beside("StopOnInstability", trainer)
        was_skipped = bool(source.monitor.quantities.skipped)  # in a run before this one
        if self.monitor not in source.monitor.keys and not was_skipped:
            keys = ", ".join(sorted(source.monitor.keys))
            raise ValueError(f"monitor={self.monitor!r} is never measured here; these are: {keys}")
        if self not in source.subscribers:
            source.subscribers.append(self)
        self._source = source
        hide_hooks(self, BATCH_HOOKS)
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self._reset()
        self._losses, self._shares_losses = source.monitor.losses, True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = monitor_among(trainer.callbacks)
        show_hooks(self)
        if source is not None and self in source.subscribers:
            source.subscribers.remove(self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stop_step is not None:  # whoever goes on after a stop wants to hear of the next one
            self._reset()
        self._losses.comparable = len(trainer.optimizers) <= 1

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        measured = self._source.monitor.keys
        missing = self.monitor not in measured or (self.monitor == COURANT and not measured & {SGD, GD})
        if missing and not self._warned:
            rank_zero_warn(
                f"StopOnInstability will never stop by {self.monitor}, which this run does not measure, but by the loss"
            )
        self._warned = missing

    def receive(self, trainer: Any, observation: Observation) -> None:
        """Take in a new observation: the monitor calls it, so that the order of the callbacks does not matter."""
        values = observation.values
        self._is_quiet = False
        collapsed = values.get("stability/collapsed", math.nan)
        self._collapsed = self._collapsed if math.isnan(collapsed) else collapsed
        if observation.step >= self.min_steps:
            self._received = observation
            self._number.add(observation)
        steps = values.get("stability/steps_to_edge", math.nan)
        if self.monitor in SCHEDULED and not math.isnan(steps) and not self._forecast:
            self._forecast = True
            self._say(
                f"forecast at step {observation.step}: the scheduled learning rate crosses today's edge of stability "
                f"at step {observation.step + steps:.0f}"
            )

    def end_step(self, trainer: Any, step: int, arrived: Sequence[ArrivedLoss]) -> None:
        """End training after ``step`` if it has to; for the arguments see `judge`."""
        # Losses and measurements are the same numbers on all processes, so all of them stop at the same step.
        trainer.should_stop |= self.judge(trainer, step, [*arrived, *self._source.monitor.losses.settle()])

    def judge(self, trainer: Any, step: int, arrived: Sequence[ArrivedLoss]) -> bool:
        """Return True to stop after ``step``, given the losses that have arrived since the step before."""
        losses = self._losses
        for loss in arrived:
            losses.add(loss)
            if self._received is not None and loss.step >= self._received.step:
                if loss.step == self._received.step and losses.exploded(loss.loss):
                    self._number.distrust(self._received, self.threshold)
                    self._is_quiet = False
                self._received = None
        if self.stop_step is not None:
            return False
        scheduled = self._source.coming_courant(trainer) if self._is_scheduled else math.nan
        if self._is_quiet and losses.is_calm and not scheduled > self.threshold:
            return False  # as at nearly every step
        self._rates.add(
            *self._source.rates(), step=step, level_step=losses.level_step, read_step=self._number.readings.latest_step
        )  # fmt: skip
        why = self._not_finite()
        if why is None and step >= self.min_steps:
            above = self._number.readings.above(self.threshold, step)
            if not math.isnan(above):
                self._cross(trainer, step, f"{self._number.name} = {above:.4g} > {self.threshold:g}")
            elif scheduled > self.threshold and self._jumps(scheduled):
                self._cross(trainer, step, f"the next learning rate is {scheduled:.3g} times the critical one")
            why = self._why(above, scheduled)
        if why is None:
            # Until the next reading nothing but the loss or the rate can end training.
            limit = min(self.threshold, FAR * self.threshold)
            self._is_quiet = not self._collapsed and all(value < limit for value in self._number.values)
            return False
        self.stop_step, self.reason = step, why
        self.announce(trainer, step, why)
        return True

    def announce(self, trainer: Any, step: int, why: str) -> None:
        """Print and log that training ends."""
        advice = "Try a lower learning rate, or a longer warm-up."
        if self._losses.broke_off and self._number.readings.latest < CALM * self.threshold:
            advice = "Nothing before shows instability: look for a sample or an operation that is not finite."
        self._say(f"stop at step {step}: {why}. {advice}")
        log(trainer, {"stability/stop": float(step)})

    @property
    def event_step(self) -> int | None:
        """The step of the first event; None before it."""
        return self.events[0] if self.events else None

    def _not_finite(self) -> str | None:
        if self._losses.finite:
            return None
        return f"the loss is {self._losses.last:g} since step {self._losses.nonfinite_step}"

    def _why(self, above: float, scheduled: float) -> str | None:
        """Return the reason to stop; None if there is none."""
        losses, readings = self._losses, self._number.readings
        if self._collapsed == 1 or (self._collapsed and (losses.risen or losses.fallen is False)):
            return "the network has collapsed: its outputs have ceased to depend on its inputs"
        jumped = scheduled > self.threshold and self._jumps(scheduled)
        if self.limit is not None and scheduled > self.limit and jumped:
            return f"the next learning rate is {scheduled:.3g} times the critical one, and was not used"
        if not math.isnan(above) and self.confirm is None:
            return self._reading(above)
        if self.confirm is None:
            return None
        rose = f"the smoothed loss rose from {losses.least:.4g} to {losses.smoothed:.4g}"
        is_growing = self._rates.has_grown(GROWTH)
        if losses.risen and (is_growing or losses.forgotten):
            rose += " while the learning rate grew" * is_growing
            # Where readings are rare, one of them, which is old by then, and a loss that rises confirm nothing.
            if not math.isnan(above) and len(readings) >= min(2, self.patience):
                return f"{self._reading(above)}, and {rose}"
            if jumped:
                return f"the learning rate is {scheduled:.3g} times the critical one, and {rose}"
        if not math.isnan(above) and losses.fallen is False and losses.count >= STUCK:
            return f"{self._reading(above)}, and {self._not_fallen()}"
        # No spike is about to be over where nothing is left of what was learned, or the rate grows above the edge.
        is_worsening = losses.alarmed and not math.isnan(above) and self._rates.has_grown()
        if (losses.alarm_lasts or losses.relapsed or is_worsening) and not self._is_calm():
            mean = f"the mean of {len(losses.recent)} losses"
            return f"{mean} rose from {losses.least_mean:.4g} to {losses.mean:.4g}, and {self._known()}"
        # The rate may have come down since; critical rates of a network that has exploded do not show that.
        comparable = not math.isnan(scheduled) and not self._number.is_blind
        least = min(readings.latest, scheduled) if comparable else readings.latest
        if self.monitor in SCHEDULED and least >= FAR * self.threshold and losses.fallen is False:
            return f"{self._known()}, far above {self.threshold:g}, and {self._not_fallen()}"
        if losses.lost and readings.latest_step <= losses.level_step:
            return f"{rose}, and {self.monitor} is unknown: nothing was measured since"
        return None

    def _is_calm(self) -> bool:
        """Return True if a reading well below the threshold says that it is not the rate that makes the loss rise.

        It was taken since the loss began to rise. An older one counts for ``patience_steps`` steps if it is a Courant
        number, which the rate of today would leave well below, and something is left of what was learned.
        """
        calm, readings, losses = min(CALM * self.threshold, self.threshold), self._number.readings, self._losses
        if not readings.latest <= calm or losses.exploded(losses.mean):
            return False
        if readings.latest_step > min(losses.level_step, losses.last_step - ALARM_LASTS):
            return True
        is_recent = losses.last_step - readings.latest_step <= self.patience_steps
        is_below = self.monitor in SCHEDULED and self._rates.leaves_below(readings.latest, calm)
        return is_recent and is_below and not losses.relapsed

    def _known(self) -> str:
        """Return in words what is known of the number that is watched."""
        readings = self._number.readings
        if not len(readings):
            return f"{self.monitor} is unknown"
        return f"{self._number.name} = {readings.latest:.4g} at step {readings.latest_step}"

    def _not_fallen(self) -> str:
        losses = self._losses
        return f"the loss has not fallen: {losses.first:.4g} at first, smoothed {losses.smoothed:.4g}"

    def _jumps(self, scheduled: float) -> bool:
        """Return True if the rate has more than doubled since the last measurement: a jump, not a slow ramp."""
        return scheduled > 2 * self._number.readings.latest

    def _cross(self, trainer: Any, step: int, reading: str) -> None:
        """Note a step that is above the threshold; log and print it if it begins an event."""
        before, self._above_step = self._above_step, step
        if self.events and step - before <= max(1, self.patience_steps):
            return
        self.events.append(step)
        self._say(f"event at step {step}: {reading}: linearly unstable")
        trainer.callback_metrics["stability/event"] = torch.tensor(float(step))
        log(trainer, {"stability/event": float(step)})

    def _reading(self, mean: float) -> str:
        text, count = f"{self._number.name} = {mean:.4g} > {self.threshold:g}", len(self._number.readings)
        text += f" (mean of {count})" * (count > 1)
        if "lyapunov" in self.monitor:
            text += f" per step (grows by e in {1 / mean:.3g} steps)" if mean > 0 else ""
        return text

    def _say(self, text: str) -> None:
        if self.verbose:
            rank_zero_info(f"{type(self).__name__}: {text}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "events": list(self.events), "above_step": self._above_step,
            "stop_step": self.stop_step, "reason": self.reason,
            "number": self._number.state_dict(), "rates": self._rates.state_dict(), "forecast": self._forecast,
            "collapsed": self._collapsed, "losses": None if self._shares_losses else self._losses.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        losses, shares_losses = self._losses, self._shares_losses
        self._reset()
        state = self.state_dict() | dict(state_dict)
        self.events, self._above_step = list(state["events"]), state["above_step"]
        self.stop_step, self.reason = state["stop_step"], state["reason"]
        self._forecast, self._collapsed, self._is_quiet = state["forecast"], state["collapsed"], False
        self._number.load_state_dict(state["number"])
        self._rates.load_state_dict(state["rates"])
        if state["losses"] is None:
            self._losses, self._shares_losses = losses, shares_losses
        else:
            self._losses.load_state_dict(state["losses"])
