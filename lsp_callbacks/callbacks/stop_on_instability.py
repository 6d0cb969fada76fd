"""The callback that stops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.monitor import Observation

#: Steps over which the loss is smoothed.
SMOOTHING = 50
#: A rise of the smoothed loss that confirms. Full-batch training at the edge of stability wavers by up to 5 %.
RISE = 0.1


class StopOnInstability(Callback):
    """Ends training when it has become unstable: at the step, not at the end of the epoch.

    Two levels. The *event*: the monitored value is above the threshold; it is logged as ``stability/event`` and printed
    once. The *stop*: it stayed above for ``patience`` new measurements or more, and the smoothed loss has not improved
    since it rose above, or is 10 % above its least value since. Healthy training at the edge of stability has events
    and no stop. A NaN neither counts nor resets.

    The value is compared, not its confidence bound: windows scatter most when a run begins to fail, so that the bound
    turned positive after the loss had gone (``benchmarks/two_populations.md``). For the stricter rule, name the bound:
    ``monitor="stability/lyapunov_lower"``.

    Args:
        monitor: a global key of the `StabilityMonitor` beside it, in either order.
        threshold: None is 0 for exponents and 1 for Courant numbers and stiffness.
        patience: consecutive new measurements.
        min_steps: ignore measurements before this step.
        confirm: "loss", or None for the bare rule without the loss.
        verbose: print the event and the stop.

    Raises:
        ValueError: for bad arguments; in ``setup``, without a `StabilityMonitor`, or on a key that it never measures.

    Attributes:
        event_step: step of the event, or None.
        stop_step: step of the stop, or None.
    """

    def __init__(
        self,
        monitor: str = "stability/lyapunov",
        *,
        threshold: float | None = None,
        patience: int = 3,
        min_steps: int = 0,
        confirm: Literal["loss"] | None = "loss",
        verbose: bool = True,
    ):
        if patience < 1:
            raise ValueError(f"patience={patience}: give at least 1 measurement")
        if confirm not in ("loss", None):
            raise ValueError(f"confirm={confirm!r}: give 'loss', or None for the bare rule")
        self.monitor, self.patience, self.min_steps = monitor, patience, min_steps
        self.threshold = (0.0 if "lyapunov" in monitor else 1.0) if threshold is None else threshold
        self.confirm, self.verbose = confirm, verbose
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        self.event_step: int | None = None
        self.stop_step: int | None = None
        self._count = 0
        self._best = self._reference = math.inf
        self._loss: Tensor | None = None
        self._smoothed: Tensor | None = None
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
        if self.receive not in source.subscribers:
            source.subscribers.append(self.receive)
        self._source = source
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self._reset()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = next((c for c in trainer.callbacks if isinstance(c, StabilityMonitor)), None)
        if source is not None and self.receive in source.subscribers:
            source.subscribers.remove(self.receive)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.stop_step is not None:  # whoever goes on after a stop wants to hear of the next one
            self._reset()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        missing = self.monitor not in self._source.monitor.keys
        if missing and not self._warned:
            rank_zero_warn(f"StopOnInstability will never stop: {self.monitor} is not measured in this run")
        self._warned = missing

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._loss = loss.detach().float() if isinstance(loss, Tensor) else None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._smooth()

    def _smooth(self) -> None:
        """Takes in the last step's loss: not at its own end, or the order of the callbacks would matter."""
        loss, self._loss = self._loss, None
        if loss is None:
            return
        # Kept on its device: reading it at every step would wait for the device at every step.
        self._seen += 1
        before = loss if self._smoothed is None else self._smoothed.to(loss.device)
        self._smoothed = before.lerp(loss, 1.0 / min(self._seen, SMOOTHING))

    def receive(self, trainer: Any, observation: Observation) -> bool:
        """Takes a new observation, and says whether to stop."""
        value = observation.values.get(self.monitor, math.nan)
        if math.isnan(value) or observation.step < self.min_steps or self.stop_step is not None:
            return False
        loss = math.inf if self._smoothed is None else float(self._smoothed)
        if not value > self.threshold:
            self._count, self._best = 0, math.inf
            return False
        if self.event_step is None:
            self._event(trainer, observation, value)
        self._count += 1
        if self._count == 1 or self._reference == math.inf:
            self._reference = loss
        self._best = min(self._best, loss)  # a NaN leaves it
        lower = loss < self._reference and loss <= self._best + RISE * abs(self._best)
        if self._count < self.patience or (self.confirm == "loss" and lower):
            return False
        self.stop_step = observation.step
        self._say(
            f"stop at step {observation.step}: {self._reading(observation, value)} for {self._count} measurements"
            + (f", and the smoothed loss went from {self._reference:.4g} to {loss:.4g}" if self.confirm else "")
            + ". Try a lower learning rate, or a longer warm-up."
        )
        return True

    def _event(self, trainer: Any, observation: Observation, value: float) -> None:
        self.event_step = observation.step
        self._say(f"event at step {observation.step}: {self._reading(observation, value)}: linearly unstable")
        trainer.callback_metrics["stability/event"] = torch.tensor(float(observation.step))
        for logger in trainer.loggers:
            row = trainer.fit_loop.epoch_loop._batches_that_stepped
            logger.log_metrics({"stability/event": float(observation.step)}, step=row)

    def _reading(self, observation: Observation, value: float) -> str:
        text = f"{self.monitor} = {value:.4g} > {self.threshold:g}"
        if "lyapunov" in self.monitor:
            text += f" per step (grows by e in {1 / value:.3g} steps)" if value > 0 else ""
        return text

    def _say(self, text: str) -> None:
        if self.verbose:
            rank_zero_info(f"StopOnInstability: {text}")

    def state_dict(self) -> dict[str, Any]:
        self._smooth()
        smoothed = None if self._smoothed is None else float(self._smoothed)
        return {
            "event_step": self.event_step, "stop_step": self.stop_step, "count": self._count,
            "best": self._best, "reference": self._reference, "smoothed": smoothed, "seen": self._seen,
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.event_step, self.stop_step = state_dict["event_step"], state_dict["stop_step"]
        self._count, self._best, self._seen = state_dict["count"], state_dict["best"], state_dict["seen"]
        self._reference, smoothed = state_dict["reference"], state_dict["smoothed"]
        self._smoothed = None if smoothed is None else torch.tensor(smoothed)
