"""The callback that stops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lsp_callbacks.arguments import number, whole
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.monitor import Observation

#: Steps over which the loss is smoothed, and the first steps whose mean is the initial loss.
SMOOTHING, INITIAL = 30, 5
#: The smoothed loss confirms when it is this much above its least value, and above this share of the initial loss:
#: once a data set is memorised, a rise of 30 % is noise.
RISE, SHARE = 0.3, 0.15
#: Keys that are a rate over a critical rate, and so can be known before the rate is used.
SCHEDULED = ("stability/courant", "stability/courant_sgd", "stability/courant_gd")


class StopOnInstability(Callback):
    """Ends training when it has become unstable: at the step, not at the end of the epoch.

    Two levels. The *event*: the mean of the last ``patience`` new measurements is above the threshold; it is logged as
    ``stability/event`` and printed once. The *stop*: it is still above, and the smoothed loss is 30 % above its least
    value so far and above 15 % of the initial loss, or not finite. Healthy training lives at the edge of stability
    for long stretches: it has events and no stop. A NaN neither counts nor resets.

    A Courant number is a learning rate over a critical one. So the rate that the schedule brings next is compared
    *before* it is used: a jump above the edge is an event before the first bad step, and a rate above ``limit``
    critical ones ends training there, without waiting for the loss. A collapsed network (its outputs have ceased to
    depend on its inputs) ends training, too.

    Args:
        monitor: a global key of the `StabilityMonitor` beside it, in either order.
        threshold: None is 0 for exponents and gains, and 1 for Courant numbers and stiffness.
        patience: new measurements in the mean.
        min_steps: ignore measurements before this step.
        confirm: "loss", which it does from step 30 on, or None for the bare rule without the loss.
        limit: the scheduled Courant number that is not used; None uses any.
        verbose: print forecast, event and stop.

    Raises:
        ValueError: for bad arguments; in ``setup``, without a `StabilityMonitor`, or on a key that it never measures.

    Attributes:
        event_step: step of the event, or None.
        stop_step: step of the stop, or None.
    """

    def __init__(
        self,
        monitor: str = "stability/courant",
        *,
        threshold: float | None = None,
        patience: int = 3,
        min_steps: int = 0,
        confirm: Literal["loss"] | None = "loss",
        limit: float | None = 10.0,
        verbose: bool = True,
    ):
        if not isinstance(monitor, str):
            raise ValueError(f"monitor={monitor!r}: give a global key, such as 'stability/courant'")
        if threshold is not None:
            number("threshold", threshold, instead=", or None")
        whole("patience", patience, 1, instead=" measurement")
        whole("min_steps", min_steps, 0)
        if confirm not in ("loss", None):
            raise ValueError(f"confirm={confirm!r}: give 'loss', or None for the bare rule")
        if limit is not None:
            number("limit", limit, above=1, instead=", a Courant number, or None")
        edge = 0.0 if any(kind in monitor for kind in ("lyapunov", "residual_gain")) else 1.0
        self.monitor, self.patience, self.min_steps, self.limit = monitor, patience, min_steps, limit
        self.threshold = edge if threshold is None else threshold
        self.confirm, self.verbose = confirm, verbose
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        self.event_step: int | None = None
        self.stop_step: int | None = None
        self._readings: list[float] = []
        self._forecast = self._collapsed = self._stochastic = False
        self._smoothed: Tensor | float | None = None
        self._least: Tensor | float | None = None
        self._initial: Tensor | float | None = None
        self._seen = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        source = next((c for c in trainer.callbacks if isinstance(c, StabilityMonitor)), None)
        if source is None:
            raise ValueError("StopOnInstability needs a StabilityMonitor: add one to Trainer(callbacks=[...])")
        if self.monitor not in source.monitor.keys:
            known = ", ".join(sorted(source.monitor.keys))
            raise ValueError(f"monitor={self.monitor!r} is never measured here; these are: {known}")
        if self not in source.subscribers:
            source.subscribers.append(self)
        self._source = source
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self._reset()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = next((c for c in trainer.callbacks if isinstance(c, StabilityMonitor)), None)
        if source is not None and self in source.subscribers:
            source.subscribers.remove(self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stop_step is not None:  # whoever goes on after a stop wants to hear of the next one
            self._reset()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        missing = self.monitor not in self._source.monitor.keys
        if missing and not self._warned:
            rank_zero_warn(f"StopOnInstability will never stop: {self.monitor} is not measured in this run")
        self._warned = missing

    # The monitor calls these two at the end of each batch, so that the order of the callbacks does not matter.

    def receive(self, trainer: Any, observation: Observation) -> None:
        """Takes in a new observation."""
        value = observation.values.get(self.monitor, math.nan)
        if self.monitor == "stability/courant" and not self._stochastic:
            # Until the probes are complete, the dial is another number: the two have no mean.
            self._stochastic = "stability/courant_sgd" in observation.values
            self._readings = [] if self._stochastic else self._readings
        self._collapsed = observation.values.get("stability/collapsed", 0.0) == 1.0
        if not math.isnan(value) and observation.step >= self.min_steps:
            self._readings = [*self._readings, value][-self.patience :]
        steps = observation.values.get("stability/steps_to_edge", math.nan)
        if self.monitor in SCHEDULED and not math.isnan(steps) and not self._forecast:
            self._forecast = True
            self._say(
                f"forecast at step {observation.step}: the scheduled learning rate crosses today's edge of stability "
                f"at step {observation.step + steps:.0f}"
            )

    def judge(self, trainer: Any, step: int, outputs: Any) -> bool:
        """Whether to stop after ``step``, whose outputs are given."""
        self._smooth(outputs)
        if self.stop_step is not None or step < self.min_steps:
            return False
        mean = sum(self._readings) / self.patience if len(self._readings) == self.patience else math.nan
        scheduled = self._source.scheduled_courant(trainer) if self.monitor in SCHEDULED else math.nan
        if self.event_step is None and mean > self.threshold:
            self._event(trainer, step, f"{self.monitor} = {mean:.4g} > {self.threshold:g}")
        elif self.event_step is None and scheduled > self.threshold and self._jumps(scheduled):
            self._event(trainer, step, f"the next learning rate is {scheduled:.3g} times the critical one")
        why = self._why(mean, scheduled)
        if why is None:
            return False
        self.stop_step = step
        self._say(f"stop at step {step}: {why}. Try a lower learning rate, or a longer warm-up.")
        return True

    def _why(self, mean: float, scheduled: float) -> str | None:
        """The reason to stop, if there is one."""
        if self._collapsed:
            return "the network has collapsed: its outputs have ceased to depend on its inputs"
        if self.limit is not None and scheduled > self.limit and self._jumps(scheduled):
            return f"the next learning rate is {scheduled:.3g} times the critical one, and was not used"
        if not mean > self.threshold:
            return None
        if self.confirm is None:
            return self._reading(mean)
        if self._smoothed is None or self._least is None or self._initial is None:
            return None
        loss, least, initial = (float(t) for t in (self._smoothed, self._least, self._initial))
        if self._seen < SMOOTHING and math.isfinite(loss):  # a healthy run may begin by going up
            return None
        # A share of the initial loss means nothing where losses can be negative.
        if loss <= least + RISE * abs(least) or (least >= 0 and loss <= SHARE * initial):
            return None
        return f"{self._reading(mean)}, and the smoothed loss rose from {least:.4g} to {loss:.4g}"

    def _jumps(self, scheduled: float) -> bool:
        """Whether the rate has more than doubled since the last measurements: a jump, not a slow ramp."""
        return bool(self._readings) and scheduled > 2 * sum(self._readings) / len(self._readings)

    def _smooth(self, outputs: Any) -> None:
        """Kept on its device: reading it at every step would wait for the device at every step."""
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(found, Tensor):
            return
        loss: Any = float(found) if found.device.type == "cpu" else found.detach().float()
        self._seen += 1
        before: Any = loss if self._smoothed is None else self._smoothed
        self._smoothed = before + (loss - before) / min(self._seen, SMOOTHING)
        if self._seen <= INITIAL:
            self._initial = self._smoothed
        least: Any = self._smoothed if self._least is None else self._least
        if isinstance(self._smoothed, Tensor):  # after a resume the others are numbers
            self._least = torch.fmin(torch.as_tensor(least).to(loss), self._smoothed)
        elif not self._smoothed >= least and not math.isnan(self._smoothed):
            self._least = self._smoothed
        else:
            self._least = least

    def _event(self, trainer: Any, step: int, reading: str) -> None:
        self.event_step = step
        self._say(f"event at step {step}: {reading}: linearly unstable")
        trainer.callback_metrics["stability/event"] = torch.tensor(float(step))
        for logger in trainer.loggers:
            row = trainer.fit_loop.epoch_loop._batches_that_stepped
            logger.log_metrics({"stability/event": float(step)}, step=row)

    def _reading(self, mean: float) -> str:
        text = f"{self.monitor} = {mean:.4g} > {self.threshold:g} (mean of {len(self._readings)})"
        if "lyapunov" in self.monitor:
            text += f" per step (grows by e in {1 / mean:.3g} steps)" if mean > 0 else ""
        return text

    def _say(self, text: str) -> None:
        if self.verbose:
            rank_zero_info(f"StopOnInstability: {text}")

    def state_dict(self) -> dict[str, Any]:
        losses = {
            name: None if value is None else float(value)
            for name, value in (("smoothed", self._smoothed), ("least", self._least), ("initial", self._initial))
        }
        return {
            "event_step": self.event_step, "stop_step": self.stop_step, "readings": list(self._readings),
            "forecast": self._forecast, "stochastic": self._stochastic, "seen": self._seen, **losses,
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._reset()
        state = self.state_dict() | dict(state_dict)  # what another release did not write is as in a new run
        self.event_step, self.stop_step = state["event_step"], state["stop_step"]
        self._readings, self._seen = list(state["readings"]), state["seen"]
        self._forecast, self._stochastic = state["forecast"], state["stochastic"]
        self._smoothed, self._least, self._initial = (state[name] for name in ("smoothed", "least", "initial"))
