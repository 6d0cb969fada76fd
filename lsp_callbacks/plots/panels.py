"""Panels of the figure of a run, drawn from steps and values: loss, Courant number, exponent, sharpness, others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.plots.figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from lsp_callbacks.plots.labels import Label, label_lines, mark_edge, mark_failures, scale_by_decades, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Number of points from which they need no marker, and from which their noise is drawn lighter than their mean.
MANY = 200
#: Each Courant number has its colour, whichever others are drawn.
COLOURS = {"courant_gd": GREEN, "courant_step": PURPLE, "courant_sgd": ORANGE, "courant_mean_square": BLACK}
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
    ax.plot(steps, values, color=BLUE, alpha=0.25 if len(steps) > 10 * MANY else 0.45, linewidth=0.6)
    ax.plot(steps, median, color=BLUE, linewidth=1.8)
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = finite.min(), min(finite.max(), 100 * max(float(np.abs(finite[:initial]).mean()), 1e-12))
        if low > 0 and high > 8 * low:
            scale_by_decades(ax, low / 1.2, high * 1.2)
        else:
            margin = 0.06 * (high - low) + 1e-9
            ax.set_ylim(low - margin, high + margin)
    set_title(ax, "Training loss", remark)


def draw_courant(ax: Axes, courant: Line, mean: Line, others: Mapping[str, Line], remark: str) -> None:
    """Draw the Courant number, its running mean, and other Courant numbers by name."""
    few = len(courant[0]) <= MANY
    ax.plot(*courant, color=BLUE, alpha=0.4 if few else 0.2, linewidth=0.7, marker="o" if few else "", markersize=2)
    labels: list[Label] = []
    for name, line in others.items():
        colour = COLOURS.get(name, GREY)
        ax.plot(*line, color=colour, linewidth=1.2, **markers(line))
        labels.append((last(line), name, colour))
    ax.plot(*mean, color=BLUE, linewidth=1.8)
    finite = _finite(courant, *others.values())
    positive = [v for v in finite if v > 0] or [1.0]
    if max(positive) > 8:
        scale_by_decades(ax, max(min(positive), 1e-2) / 1.3, min(max(positive), 1e3) * 1.3)
    else:
        ax.set_ylim(min(0.0, *finite), max(1.25, 1.08 * max(positive)))
    label_lines(ax, labels + mark_edge(ax, 1.0))
    mark_failures(ax, *courant)
    set_title(ax, "Courant number", remark)


def draw_exponent(ax: Axes, exponent: Line, lower: Line, upper: Line, remark: str) -> None:
    """Draw the exponent of the sharp mode between its bounds."""
    ax.plot(*exponent, color=GREEN, linewidth=1.8, **markers(exponent))
    if list(lower[0]) == list(upper[0]):
        ax.fill_between(lower[0], lower[1], upper[1], color=GREEN, alpha=0.22, linewidth=0)
    finite = _finite(exponent, lower, upper)
    low, high = min(*finite, 0.0), max(*finite, 0.0)
    margin = 0.1 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + 2 * margin)
    label_lines(ax, mark_edge(ax, 0.0))
    mark_failures(ax, *exponent)
    set_title(ax, "Sharp-mode exponent, per step", remark)


def draw_sharpness(ax: Axes, sharpness: Line, limit: Line, remark: str) -> None:
    """Draw the sharpness beside the largest one that is stable at the learning rate."""
    ax.plot(*sharpness, color=PURPLE, linewidth=1.4, **markers(sharpness))
    low, high = _range(sharpness, limit)
    labels: list[Label] = [(last(sharpness), "sharpness", PURPLE)]
    if limit[0]:
        ax.plot(*limit, color=RED, linewidth=0.9, **markers(limit))
        ax.fill_between(limit[0], limit[1], high, color=RED, alpha=0.07, linewidth=0)
        labels.append((last(limit), "largest stable", RED))
    ax.set_ylim(low, high)
    label_lines(ax, labels)
    mark_failures(ax, *sharpness)
    set_title(ax, "Sharpness", remark)


def draw_number(ax: Axes, line: Line, title: str, edge: float, remark: str) -> None:
    """Draw one number; where it has an edge, the region above it is shaded."""
    ax.plot(*line, color=BLACK, linewidth=1.2, **markers(line))
    ax.set_ylim(*_range(line, ((), [edge] if math.isfinite(edge) else [])))
    if math.isfinite(edge):
        label_lines(ax, mark_edge(ax, edge))
    mark_failures(ax, *line)
    set_title(ax, title, remark)


def _range(*lines: Line) -> tuple[float, float]:
    """Return the range of an axis that holds all finite values of some lines."""
    finite = _finite(*lines)
    low, high = min(finite), max(finite)
    margin = 0.1 * max(high - low, 0.1 * abs(high), 1e-9)
    return low - margin, high + margin


def markers(line: Line) -> dict[str, Any]:
    """Return the marker of a line: one of few points shows them."""
    return {"marker": "o", "markersize": 3} if len(line[0]) < 5 else {}
