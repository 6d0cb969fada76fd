"""From an observation to Lightning's loggers, metrics and progress bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from lsp_callbacks.monitor.history import scalars
from lsp_callbacks.quantities.base import is_global


class Stopwatch:
    """The share of the time since it was started that was spent inside of it."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._entered = self._spent = 0.0

    def start(self) -> None:
        """From now on."""
        self._started, self._spent = time.perf_counter(), 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._spent += time.perf_counter() - self._entered

    @property
    def share(self) -> float:
        """0 before the start."""
        if self._started is None:
            return 0.0
        return self._spent / max(time.perf_counter() - self._started, 1e-9)


def log(trainer: Any, values: Mapping[str, float]) -> None:
    """To every logger, at the row that Lightning itself gives to this batch."""
    row = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=row)


def show(trainer: Any, values: Mapping[str, float], **others: torch.Tensor) -> None:
    """Finite global values to ``callback_metrics``, and the dial to the progress bar.

    Args:
        trainer: Lightning's.
        values: by key.
        others: tensors that are put there as they are, by the key's last part.
    """
    found = scalars(values)
    shown = {key: torch.tensor(value) for key, value in found.items()}
    trainer.callback_metrics.update(shown | {f"stability/{name}": value for name, value in others.items()})
    if "stability/courant" in found:
        trainer.progress_bar_metrics["courant"] = round(found["stability/courant"], 3)


def thinned(values: Mapping[str, float], layers: str | int) -> dict[str, float]:
    """All global keys, and of those of layers "all", none ("summary"), or the so many largest of each kind."""
    if layers == "all":
        return dict(values)
    kept = {key: value for key, value in values.items() if is_global(key)}
    if layers == "summary":
        return kept
    assert isinstance(layers, int)
    kinds: dict[str, list[str]] = {}
    for key in values.keys() - kept.keys():
        kinds.setdefault(key.rsplit("/", 1)[0], []).append(key)
    for keys in kinds.values():
        kept |= {key: values[key] for key in sorted(keys, key=lambda k: -abs(values[k]))[:layers]}
    return kept
