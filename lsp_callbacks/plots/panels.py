"""Panels of the figure of a run, drawn from steps and values: loss, Courant number, exponent, layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.plots.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, load
from lsp_callbacks.plots.labels import Label, label_lines, mark_edge, mark_failures, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Largest number of layers that are named in a panel; the others are drawn in grey.
NAMED = 6
#: Steps and values of a line.
Line = tuple[Sequence[int], Sequence[float]]


def last(line: Line) -> float:
    """Return the last value that is not NaN; NaN without one."""
    return next((value for value in reversed(line[1]) if not math.isnan(value)), math.nan)


def _finite(*lines: Line) -> list[float]:
    """Return all finite values, at least one."""
    return [value for _, values in lines for value in values if math.isfinite(value)] or [0.0]


def draw_loss(ax: Axes, steps: np.ndarray, values: np.ndarray, median: np.ndarray, initial: int, remark: str) -> None:
    """Draw the training loss and its median; an explosion does not hide what came before it.

    Args:
        ax: to draw into.
        steps: of the values.
        values: of the loss.
        median: of the loss around each step.
        initial: number of first values whose mean limits the axis.
        remark: beside the title.
    """
    ax.plot(steps, values, color=BLUE, alpha=0.45, linewidth=0.6)
    ax.plot(steps, median, color=BLUE, linewidth=1.8)
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = finite.min(), min(finite.max(), 100 * max(float(np.abs(finite[:initial]).mean()), 1e-12))
        if low > 0 and high > 8 * low:
            ax.set_yscale("log")
            ax.set_ylim(low / 1.2, high * 1.2)
        else:
            margin = 0.06 * (high - low) + 1e-9
            ax.set_ylim(low - margin, high + margin)
    set_title(ax, "Training loss", remark)


def draw_courant(ax: Axes, courant: Line, mean: Line, others: Mapping[str, Line], remark: str) -> None:
    """Draw the Courant number, its running mean, and other Courant numbers by name."""
    ax.plot(*courant, color=BLUE, alpha=0.4, linewidth=0.7, marker="o", markersize=2)
    ax.plot(*mean, color=BLUE, linewidth=1.8)
    labels: list[Label] = []
    for (name, line), colour in zip(others.items(), (GREEN, PURPLE, ORANGE)):
        ax.plot(*line, color=colour, linewidth=1.2)
        labels.append((last(line), name, colour))
    finite = _finite(courant, *others.values())
    positive = [v for v in finite if v > 0] or [1.0]
    if max(positive) > 8:
        ax.set_yscale("log")
        ax.set_ylim(max(min(positive), 1e-2) / 1.3, min(max(positive), 1e3) * 1.3)
    else:
        ax.set_ylim(min(0.0, *finite), max(1.25, 1.08 * max(positive)))
    label_lines(ax, labels + mark_edge(ax, 1.0))
    mark_failures(ax, *courant)
    set_title(ax, "Courant number", remark)


def draw_exponent(ax: Axes, exponent: Line, lower: Line, upper: Line, remark: str) -> None:
    """Draw the exponent of the sharp mode between its bounds."""
    ax.plot(*exponent, color=GREEN, linewidth=1.8, **_markers(exponent))
    if list(lower[0]) == list(upper[0]):
        ax.fill_between(lower[0], lower[1], upper[1], color=GREEN, alpha=0.22, linewidth=0)
    finite = _finite(exponent, lower, upper)
    low, high = min(*finite, 0.0), max(*finite, 0.0)
    margin = 0.1 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + 2 * margin)
    label_lines(ax, mark_edge(ax, 0.0))
    mark_failures(ax, *exponent)
    set_title(ax, "Sharp-mode exponent, nats per step", remark)


def draw_layers(ax: Axes, layers: Mapping[str, Line], title: str, level: float | None) -> None:
    """Draw one line a layer, the largest with names; a ``level`` above which a layer expands is a mark, no alarm."""
    largest = sorted(layers, key=lambda layer: -last(layers[layer]))[:NAMED]
    named = [layer for layer in layers if layer in largest]  # colours follow the depth
    shades = dict(zip(named, load("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.85, max(len(named), 2)))))
    for layer, line in layers.items():
        look = {"color": shades[layer], "linewidth": 1.3} if layer in shades else {"color": "#c4c4c4", "linewidth": 0.6}
        ax.plot(*line, **look, zorder=2.5 if layer in shades else 2, **_markers(line))
    finite = _finite(*layers.values())
    low, high = min(finite), max(finite)
    if level is not None:
        low, high = min(low, level), max(high, level)
        ax.axhline(level, color=GREY, linewidth=0.9, zorder=1)
    if level is None and low > 0 and high > 30 * low:
        ax.set_yscale("log")
    else:
        margin = 0.1 * max(high - low, 0.1 * abs(high), 1e-6)
        ax.set_ylim(low - margin, high + margin)
    labels: list[Label] = [(last(layers[layer]), layer, shades[layer]) for layer in named]
    label_lines(ax, labels)
    rest = f"the {NAMED} largest of {len(layers)}" if len(named) < len(layers) else ""
    meaning = [] if level is None else [f"above {level:g} a block stretches some difference, as most do"]
    set_title(ax, title, "; ".join([*meaning, rest] if rest else meaning))


def _markers(line: Line) -> dict[str, Any]:
    """Return the marker of a line: one of few points shows them."""
    return {"marker": "o", "markersize": 3} if len(line[0]) < 5 else {}
