"""Numbers of layers or blocks over time: a line for each where they are few, otherwise a map of colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.plots.depth_map import edges
from lsp_callbacks.plots.figure import BLACK, GREY, load
from lsp_callbacks.plots.labels import Label, label_lines, mark_failures, scale_by_decades, set_title
from lsp_callbacks.plots.panels import Line, last, markers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Number of layers that have a line each, and how many of more are named.
LINES, NAMED = 8, 6
#: Columns of a map: more than these are no pixels of their own.
COLUMNS = 600


def draw_layers(ax: Axes, layers: Mapping[str, Line], title: str, level: float | None, remark: str = "") -> None:
    """Draw the numbers of layers over time.

    Args:
        ax: to draw into.
        layers: lines by name, in the order of the network.
        title: of the panel.
        level: above which a layer expands: a mark, no alarm; None without one.
        remark: beside the title.
    """
    if len(layers) <= LINES:
        _draw_lines(ax, layers, level)
        set_title(ax, title, remark)
    else:
        _draw_map(ax, layers, level)
        ax.set_title(title, y=1.0)  # beside the scale of colours, not above it


def _draw_lines(ax: Axes, layers: Mapping[str, Line], level: float | None) -> None:
    shades = load("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.85, max(len(layers), 2)))  # follow the depth
    labels: list[Label] = []
    for (layer, line), shade in zip(layers.items(), shades):
        ax.plot(*line, color=shade, linewidth=1.3, **markers(line))
        labels.append((last(line), layer, shade))
        mark_failures(ax, *line)
    finite = _finite(layers)
    low, high = float(finite.min()), float(finite.max())
    if level is not None:
        low, high = min(low, level), max(high, level)
        ax.axhline(level, color=GREY, linewidth=0.9, zorder=1)
    if level is None and low > 0 and high > 30 * low:
        scale_by_decades(ax, low / 1.2, high * 1.2)
    else:
        margin = 0.1 * max(high - low, 0.1 * abs(high), 1e-6)
        ax.set_ylim(low - margin, high + margin)
    label_lines(ax, labels)


def _draw_map(ax: Axes, layers: Mapping[str, Line], level: float | None) -> None:
    """Draw a row for each layer, the first at the top; the largest at the end are named, a failure is grey."""
    steps, cells = _cells(layers)
    finite = _finite(layers)
    low, high = float(finite.min()), float(finite.max())
    colours, name = load("matplotlib.colors"), "viridis"
    norm: Any = colours.LogNorm(low, high) if low > 0 and high > 30 * low else colours.Normalize(low, high)
    if level is not None:
        most = max(high - level, level - low, 1e-12)
        norm, name = colours.Normalize(level - most, level + most), "RdBu_r"
    shown = load("matplotlib").colormaps[name].with_extremes(bad="#b8b8b8")
    rows = np.arange(len(layers) + 1) - 0.5
    drawn = np.ma.masked_invalid(np.clip(cells, low, high))  # an infinite one has the last colour
    mesh: Any
    if len(steps) == 1:  # a cell of one step would be thinner than a line
        points = np.full(len(layers), steps[0]), np.arange(len(layers))
        mesh = ax.scatter(*points, s=30, marker="s", c=drawn[:, 0], cmap=shown, norm=norm, plotnonfinite=True)
    else:
        mesh = ax.pcolormesh(edges(steps), rows, drawn, cmap=shown, norm=norm, rasterized=True)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.grid(False)
    ax.set_ylabel("depth", fontsize=8)
    ends = {layer: last(line) for layer, line in layers.items()}
    largest = sorted((n for n in ends if np.isfinite(ends[n])), key=lambda n: -ends[n])[:NAMED]
    label_lines(ax, [(float(i), f"{n} {ends[n]:.2f}", BLACK) for i, n in enumerate(layers) if n in largest])
    _draw_scale(ax, mesh, f"{NAMED} largest of {len(layers)} named")


def _draw_scale(ax: Axes, mesh: Any, remark: str) -> None:
    """Draw the scale of colours above the map, at its right end."""
    place = ax.inset_axes((0.84, 1.045, 0.16, 0.06))
    figure: Any = ax.get_figure()
    bar = figure.colorbar(mesh, cax=place, orientation="horizontal")
    bar.outline.set_linewidth(0.5)
    place.xaxis.set_ticks([])
    place.xaxis.set_ticks([], minor=True)
    low, high = mesh.norm.vmin, mesh.norm.vmax
    look: dict[str, Any] = {"transform": place.transAxes, "va": "center", "fontsize": 7.5, "color": GREY}
    place.text(-0.04, 0.5, f"{remark}     {low:.3g}", ha="right", **look)
    place.text(1.04, 0.5, f"{high:.3g}", ha="left", **look)


def _finite(layers: Mapping[str, Line]) -> np.ndarray:
    values = np.concatenate([np.asarray(values, dtype=float) for _, values in layers.values()])
    finite = values[np.isfinite(values)]
    return finite if len(finite) else np.zeros(1)


def _cells(layers: Mapping[str, Line]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the columns, and a row for each layer: the largest value where several share a cell."""
    steps = np.unique(np.concatenate([np.asarray(steps) for steps, _ in layers.values()]))
    stride = -(-len(steps) // COLUMNS)
    columns = {int(step): i // stride for i, step in enumerate(steps)}
    cells = np.full((len(layers), -(-len(steps) // stride)), np.nan)
    for row, (measured, values) in enumerate(layers.values()):
        np.fmax.at(cells[row], [columns[int(step)] for step in measured], np.asarray(values, dtype=float))
    return steps[::stride].astype(float), cells
