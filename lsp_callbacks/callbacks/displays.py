"""Where a run is shown while it goes on: below a progress bar of rich, or in a cell of a notebook."""

from __future__ import annotations

import base64
import io
import sys
from html import escape
from typing import Any, Protocol

from lsp_callbacks import report
from lsp_callbacks.callbacks.run_results import RunResults
from lsp_callbacks.callbacks.stability_report import StabilityReport
from lsp_callbacks.report.live_panel import LivePanel


class Display(Protocol):
    """A place that shows the run so far, instead of what it showed before."""

    def show(self, trainer: Any, source: RunResults) -> None:
        """Show the run so far.

        Args:
            trainer: Lightning's.
            source: what was measured.
        """


class TerminalDisplay:
    """The lines below Lightning's ``RichProgressBar``.

    Args:
        bar: the progress bar, whose ``progress`` is made when training starts.
    """

    def __init__(self, bar: Any):
        self._bar = bar
        self._progress: Any = None
        self._panel: LivePanel | None = None

    def show(self, trainer: Any, source: RunResults) -> None:
        """Show numbers, event and sentence in a panel."""
        progress = self._bar.progress
        if progress is None or not progress.console.is_terminal:
            return
        self._panel = LivePanel(source.history, source.verdict)
        if progress is not self._progress:
            self._progress, bars = progress, progress.get_renderables
            # The bar asks for what to draw many times a second, and for the last time after our last hook.
            progress.get_renderables = lambda: [*bars(), self._panel]
        progress.refresh()


class NotebookDisplay:
    """An output of a notebook's cell, whose content is replaced.

    Args:
        shell: IPython's.
    """

    def __init__(self, shell: Any):
        self._shell = shell
        self._handle: Any = None

    def show(self, trainer: Any, source: RunResults) -> None:
        """Show the figure of the run, with its loss where a `StabilityReport` keeps it, and the sentence below."""
        from IPython.display import HTML, DisplayHandle  # which is running

        keeper = next((callback for callback in trainer.callbacks if isinstance(callback, StabilityReport)), None)
        figure = report.figure(source.history) if keeper is None else keeper.picture(trainer)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        words, data = escape(report.sentence(source.verdict)), base64.b64encode(png.getvalue()).decode()
        content = HTML(f'<img style="max-width: 760px" alt="{words}" src="data:image/png;base64,{data}"><p>{words}</p>')
        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(content)
        else:
            self._handle.update(content)


def notebook() -> Any | None:
    """Return IPython's shell if this process is a notebook's; nobody imports IPython for that."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None
