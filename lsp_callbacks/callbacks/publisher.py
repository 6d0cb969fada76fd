"""From an observation to Lightning's loggers, metrics and progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lsp_callbacks.callbacks._lightning_internals import logged_row
from lsp_callbacks.callbacks.log_pictures import by_kind, log_histogram
from lsp_callbacks.monitor.history import Curve, Observation
from lsp_callbacks.quantities.key import is_global, scalars


class Stopwatch:
    """The share of the time since it was started that went into measuring.

    Attributes:
        spent: seconds of measuring, to which whoever measures adds.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self.spent = 0.0

    def start(self) -> None:
        """Count from now on."""
        self._started, self.spent = time.perf_counter(), 0.0

    @property
    def share(self) -> float:
        """The share of the time; 0 before the start."""
        if self._started is None:
            return 0.0
        return self.spent / max(time.perf_counter() - self._started, 1e-9)


class Publisher:
    """Shows observations to loggers, ``callback_metrics`` and the progress bar, with their age and the time they took.

    Args:
        layers: of the values of single layers "all", none ("summary"), the so many largest of each kind, or a
            "histogram" of each kind.

    Attributes:
        measured_at: step of the last measurement; None before it.
    """

    def __init__(self, layers: str | int):
        self.layers, self.stopwatch = layers, Stopwatch()
        self._steps = np.zeros((), np.float32)
        self._age = torch.from_numpy(self._steps)  # the same number: an operation of torch takes ten times as long
        self.measured_at: int | None = None

    def reset(self) -> None:
        """Forget when the last measurement was, as before a first run."""
        self.measured_at = None

    def publish(self, trainer: Any, observation: Observation, *, sub_batch: int | None = None) -> None:
        """Show an observation at the row that Lightning itself gives to this batch.

        Args:
            trainer: Lightning's.
            observation: of one step.
            sub_batch: of how many samples it is; None is the whole batch.
        """
        values = thinned(observation.values, self.layers)
        values["stability/overhead"] = self.stopwatch.share
        if sub_batch is not None:
            values["stability/sub_batch"] = float(sub_batch)
        self._show(trainer, values)
        log(trainer, values)
        for kind, of_layers in by_kind(observation.values).items() if self.layers == "histogram" else ():
            for logger in trainer.loggers:
                log_histogram(logger, kind, of_layers, logged_row(trainer))

    def update_age(self, step: int) -> None:
        """Count the steps up to ``step`` since the last measurement."""
        if self.measured_at is not None:  # the tensor that lies in callback_metrics: reading that dict is expensive
            self._steps[()] = step - self.measured_at

    def resume(self, trainer: Any, history: Mapping[str, Curve]) -> None:
        """Show the last values of an earlier run: stock callbacks find their key before the next measurement, too."""
        self.measured_at = max(curve.steps[-1] for curve in history.values())
        last = {key: [v for v in curve.values if math.isfinite(v)][-1:] for key, curve in history.items()}
        self._show(trainer, {key: values[0] for key, values in last.items() if values})

    def _show(self, trainer: Any, values: Mapping[str, float]) -> None:
        """Show finite global values, and the headline metric in the progress bar."""
        shown, metrics = scalars(values), trainer.callback_metrics  # which is expensive to ask for
        metrics.update(zip(shown, torch.tensor([*shown.values()]).unbind()))
        metrics["stability/age"] = self._age
        if "stability/courant" in shown:
            trainer.progress_bar_metrics["courant"] = round(shown["stability/courant"], 3)


def log(trainer: Any, values: Mapping[str, float]) -> None:
    """Log values with every logger, at the row that Lightning itself gives to this batch."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=logged_row(trainer))


def show(trainer: Any, values: Mapping[str, float]) -> None:
    """Log values that no reading brings, for the progress bar and other callbacks, too."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    log(trainer, values)


def thinned(values: Mapping[str, float], layers: str | int) -> dict[str, float]:
    """Return all global values, and those of single layers that are asked for, see `Publisher`."""
    if layers == "all":
        return dict(values)
    thin = {key: value for key, value in values.items() if is_global(key)}
    if layers in ("summary", "histogram"):
        return thin
    assert isinstance(layers, int)
    kinds: dict[str, list[str]] = {}
    for key in values.keys() - thin.keys():
        kinds.setdefault(key.rsplit("/", 1)[0], []).append(key)
    for keys in kinds.values():
        thin |= {key: values[key] for key in sorted(keys, key=lambda k: -abs(values[k]))[:layers]}
    return thin
