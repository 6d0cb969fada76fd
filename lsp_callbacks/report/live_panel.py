"""A panel for the terminal, while a run goes on: the numbers that decide, the event, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.plots.figure import load
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.report.curves import latest, readings
from lsp_callbacks.report.judgement import Verdict
from lsp_callbacks.report.looks import look
from lsp_callbacks.report.sentence import e_folding, sentence

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

#: Readings in the small curve beside a number, and the heights of its bars.
SHOWN, BARS = 16, "▁▂▃▄▅▆▇█"
#: The sign in the panel says the same.
COLOURS = {"calm": "green", "care": "yellow", "bad": "red", "unknown": "bright_black"}


class LivePanel:
    """What is drawn at one reading; it is laid out once for a width, however often a progress bar draws it.

    Args:
        history: of the `StabilityMonitor`.
        verdict: on the run so far.

    Raises:
        ImportError: without rich.
    """

    def __init__(self, history: Mapping[str, Curve], verdict: Verdict):
        self._history, self._verdict = history, verdict
        self._laid_out: dict[int, list[Segment]] = {}
        self._lay_out = self._panel(load("rich.panel").Panel)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        width = options.max_width
        if width not in self._laid_out:
            self._laid_out = {width: list(console.render(self._lay_out, options.update(height=None)))}
        yield from self._laid_out[width]

    def _panel(self, panel: Any) -> Any:
        kind, sign = look(self._verdict.state)
        steps = [curve.steps[-1] for curve in self._history.values() if curve.steps]
        at = f" at step {max(steps):,}" if steps else ""
        words = load("rich.text").Text(sentence(self._verdict).removeprefix("lsp_callbacks: "), overflow="fold")
        return panel(
            load("rich.console").Group(_numbers(self._history, self._verdict), words),
            title=f"{sign} {self._verdict.state}{at}", title_align="left", border_style=COLOURS[kind], padding=(0, 1),
        )  # fmt: skip


def _numbers(history: Mapping[str, Curve], verdict: Verdict) -> Table:
    """Return a row for each number that was measured: its name, its last reading, a small curve, what to compare."""
    grid = load("rich.table").Table.grid(padding=(0, 2))
    for column in ({"no_wrap": True}, {"justify": "right", "no_wrap": True}, {"no_wrap": True}, {}):
        grid.add_column(**column)
    for name, key, edge in (
        ("Courant number", "courant", 1.0),
        ("sharpness x rate", "courant_gd", 1.0),
        ("exponent", "lyapunov", 0.0),
    ):
        curve = history.get(PREFIX + key)
        if curve is not None and curve.values:
            last = curve.values[-1]
            style = "bold red" if last > edge or math.isnan(last) else "bold"
            said = "failed" if math.isnan(last) else f"{last:+.2g}" if edge == 0 else f"{last:.2g}"
            grid.add_row(name, f"[{style}]{said}[/]", small_curve(curve.values, edge), _beside(key, history))
    event, stop = verdict.evidence.get("event"), verdict.evidence.get("stop")
    ended = "" if stop is None else f"stopped at step {stop:,}"
    grid.add_row("event", "none" if event is None else f"[bold red]step {event:,}[/]", ended, "")
    return grid


def _beside(key: str, history: Mapping[str, Curve]) -> str:
    if key == "courant":
        return "the edge is at 1"
    if key == "lyapunov":
        return e_folding(latest(history[PREFIX + key])) if readings(history[PREFIX + key]) else ""
    sharpness, limit = (latest(history.get(PREFIX + name)) for name in ("sharpness", "sharpness_limit"))
    return f"of its limit: {sharpness:.3g}" + ("" if math.isnan(limit) else f" of {limit:.3g}")


def small_curve(values: Sequence[float], edge: float) -> Text:
    """Return the last readings as bars, those beyond the edge in red; a failed one is a cross.

    Example:
        >>> small_curve([0.0, 0.5, 1.0, float("nan")], 1.0).plain
        '▁▅█x'
    """
    text, shown = load("rich.text").Text(), values[-SHOWN:]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min([edge if edge == 0 else 0.0, *finite]), max([edge, *finite])
    for value in shown:
        share = min(max((value - low) / (high - low or 1.0), 0.0), 1.0)  # of NaN 0, which is not used
        bar = "x" if math.isnan(value) else BARS[min(int(share * len(BARS)), len(BARS) - 1)]
        text.append(bar, "red" if not value <= edge else "blue")
    return text
