"""Table of what was measured: one row a number, with its range over the run and its meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.plots.figure import load
from lsp_callbacks.quantities.key import PREFIX, Key
from lsp_callbacks.quantities.tables import stated_keys
from lsp_callbacks.report.curves import latest, readings

if TYPE_CHECKING:
    from rich.table import Table

#: Numbers that the loop adds to those of the quantities.
OF_THE_RUN = {
    "courant": Key(
        "Learning rate / largest stable learning rate: 1 is the edge.",
        "",
        "If it stays above 1 and the loss does not fall: lower the learning rate.",
        threshold=1.0,
    ),
    "steps_to_edge": Key("Steps until the schedule reaches the largest stable learning rate.", "steps"),
    "lr_cap": Key("Learning rate above which `CapLearningRate` lowers that of an update.", "learning rate"),
    "lr_scheduled": Key("Learning rate of the schedule.", "learning rate"),
    "lr_applied": Key("Learning rate that the update has used.", "learning rate"),
}


def keys_of_a_run() -> dict[str, Key]:
    """Return all keys by name, without ``stability/``: those that the loop adds, and those of the quantities."""
    return OF_THE_RUN | stated_keys()


def table(history: Mapping[str, Curve]) -> Table:
    """Return one row a number: its last reading, its range over the run, the step of the last one, its meaning.

    The numbers of layers have one row a kind, with the range over the layers at their last reading and the three
    largest. An error stands beside the number that it belongs to.

    Args:
        history: of the `StabilityMonitor`.

    Raises:
        ImportError: without rich.
    """
    curves = {key.removeprefix(PREFIX): curve for key, curve in history.items()}
    curves.pop("courant_source", None)
    for name in ("courant_mean_square", "courant_sgd", "courant_gd"):  # shown as "courant" already
        if curves.get("courant") == curves.get(name):
            curves.pop(name, None)
    keys = keys_of_a_run()
    errors = {
        key.error_of: key.error_format.format(error)
        for name, key in keys.items()
        if key.error_of and not math.isnan(error := latest(curves.pop(name, None)))
    }
    rows = load("rich.table").Table(
        title="Stability", title_justify="left", title_style="bold", box=load("rich.box").SIMPLE_HEAD
    )
    rows.add_column("quantity", no_wrap=True)
    for column in ("last", "min", "max", "step"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("meaning")
    without_meaning = Key("")
    for name in [*(name for name in keys if name in curves), *(n for n in curves if n not in keys and "/" not in n)]:
        key = keys.get(name, without_meaning)
        values = readings(curves[name]) or [math.nan]
        meaning = key.meaning + (f" ({errors[name]})" if name in errors else "")
        if failed := sum(map(math.isnan, curves[name].values)):
            meaning += f" [yellow]({failed} NaN)[/]"
        style = "red" if values[-1] > key.threshold else "bold"
        range_ = (f"{min(values):.3g}", f"{max(values):.3g}", str(curves[name].steps[-1]))
        rows.add_row(name, f"[{style}]{values[-1]:.3g}[/]", *range_, meaning)
    _add_layers(rows, curves)
    return rows


def _add_layers(rows: Table, curves: Mapping[str, Curve]) -> None:
    kinds: dict[str, list[tuple[float, str, int]]] = {}
    for name, curve in curves.items():
        kind, _, layer = name.partition("/")
        if layer and readings(curve):
            kinds.setdefault(kind, []).append((latest(curve), layer, curve.steps[-1]))
    for kind, layers in kinds.items():
        layers.sort(reverse=True)
        meaning = ", ".join(f"{layer} {value:.3g}" for value, layer, _ in layers[:3])
        meaning += f" (of {len(layers)})" if len(layers) > 3 else ""
        step = str(max(step for *_, step in layers))
        rows.add_row(f"{kind}/*", "", f"{layers[-1][0]:.3g}", f"{layers[0][0]:.3g}", step, meaning, style="dim")


def print_report(*parts: Table | str) -> None:
    """Print tables and sentences, above a progress bar that may be running.

    Args:
        parts: strings are printed as they are.
    """
    console = load("rich.console").Console()
    if not console.is_terminal:  # no terminal limits the width
        console.width = 130
    console.print()  # a progress bar leaves the cursor at its end
    for part in parts:
        plain = isinstance(part, str)
        console.print(part, soft_wrap=plain, markup=not plain, highlight=False)
