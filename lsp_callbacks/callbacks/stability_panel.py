"""The callback that shows the numbers while training runs: in the terminal, or in a notebook."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lsp_callbacks.callbacks._lightning_internals import is_kind_of
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.displays import Display, NotebookDisplay, TerminalDisplay, notebook
from lsp_callbacks.callbacks.hidden_hooks import BATCH_HOOKS, hide_hooks, show_hooks
from lsp_callbacks.callbacks.stability_monitor import monitor_among, monitor_beside
from lsp_callbacks.monitor.history import Observation

#: Seconds between two drawings for each second that one takes: 5 % of the time at most.
REST = 20.0


class StabilityPanel(Callback):
    """Shows the stability of training while it runs: the headline number, the event, the verdict so far.

    - In a terminal beside Lightning's ``RichProgressBar``: a panel below the bar, with the Courant number, sharpness
      times rate, the exponent, the event and one sentence.
    - In a notebook: the figure of the run, in the place where it was first shown.
    - Elsewhere (beside ``TQDMProgressBar``, without a terminal, in a log file) nothing.

    It draws at the end of a step at which something was measured, at most a twentieth of the time, and once more when
    training ends; at other steps Lightning passes over it. Training is the same to the last bit.

    Raises:
        ValueError: in ``setup``, without a `StabilityMonitor`.

    Example:
        >>> from pytorch_lightning.callbacks import RichProgressBar
        >>> from lsp_callbacks import StabilityMonitor, StabilityPanel
        >>> callbacks = [StabilityMonitor(), StabilityPanel(), RichProgressBar()]  # for Trainer(callbacks=callbacks)
    """

    def __init__(self) -> None:
        self._display: Display | None = None
        self._next = -math.inf  # time of the next drawing

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._source = monitor_beside("StabilityPanel", trainer)
            hide_hooks(self, BATCH_HOOKS)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._display, self._next = display_of(trainer), -math.inf
        if self._display is not None and self._note not in self._source.reading_listeners:
            self._source.reading_listeners.append(self._note)

    def _note(self, observation: Observation) -> None:
        """Draw at the end of the step, when its loss and what it has led to are known."""
        if time.monotonic() >= self._next:
            show_hooks(self, ("on_train_batch_end",))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        hide_hooks(self, ("on_train_batch_end",))
        self._draw(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._draw(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = monitor_among(trainer.callbacks)
        show_hooks(self)
        self._display = None
        if source is not None and self._note in source.reading_listeners:
            source.reading_listeners.remove(self._note)

    def _draw(self, trainer: Any) -> None:
        if self._display is None:
            return
        began = time.monotonic()
        try:
            self._display.show(trainer, self._source)
        except Exception as error:  # no reason to end a run
            rank_zero_warn(f"StabilityPanel shows nothing any more: {type(error).__name__}: {error}")
            self._display = None
        ended = time.monotonic()
        self._next = ended + REST * (ended - began)


def display_of(trainer: Any) -> Display | None:
    """Return where a run can be shown; None where it cannot."""
    if not trainer.is_global_zero:
        return None
    if (shell := notebook()) is not None:
        return NotebookDisplay(shell)
    bar = trainer.progress_bar_callback
    return TerminalDisplay(bar) if is_kind_of("RichProgressBar", bar) else None
