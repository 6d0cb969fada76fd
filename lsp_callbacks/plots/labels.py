"""Labels of a panel: names of lines at their ends, events above, the edge of stability, failed measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.plots.figure import GREY, ORANGE, PURPLE, RED, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Events differ in colour and in dashes.
EVENTS = ((ORANGE, (0, (5, 2))), (PURPLE, (0, (1, 1.2))), (RED, "solid"), (GREY, (0, (3, 1, 1, 1))))
#: Height of a line of labels, as a share of a panel's.
LINE = 0.085

Label = tuple[float, str, Any]


def mark_events(strip: Axes, panels: Sequence[Axes], marks: Sequence[tuple[int, str, Any]], end: int) -> None:
    """Draw vertical lines through all panels, named in a strip above them, each in a row of its own.

    Args:
        strip: axes above the panels.
        panels: axes that the lines pass through.
        marks: step, text and style of each event.
        end: last step of the run.
    """
    strip.axis("off")
    strip.set_ylim(len(marks), 0)
    # Names to the right of their lines come first, the rightmost of the others next: so few lines cross a name.
    rows = sorted(marks, key=lambda mark: mark[0] if mark[0] < 0.6 * end else 2 * end - mark[0])
    for row, (step, text, (colour, dashes)) in enumerate(rows):
        line = {"color": colour, "linestyle": dashes, "linewidth": 1.3}
        left = step >= 0.6 * end
        strip.plot([step, step], [row + 0.1, len(marks)], zorder=1, **line)
        name = strip.annotate(
            f"{text}, step {step:,}", (step, row + 0.5), xytext=(-5 if left else 5, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        name.set_in_layout(False)  # it may reach beyond the strip, which keeps its height
        for ax in panels:
            ax.axvline(step, zorder=1.5, **line)


def set_title(ax: Axes, title: str, remark: str) -> None:
    """Set the title of a panel on the left, and a remark on the right."""
    ax.set_title(title)
    ax.set_title(remark, loc="right", color=GREY, fontsize=8, fontweight="normal")


def scale_by_decades(ax: Axes, low: float, high: float) -> None:
    """Give an axis a logarithmic scale; one of few decades has numbers between its powers of ten, too."""
    ticker = load("matplotlib.ticker")
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    if high < 300 * low:
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def mark_edge(ax: Axes, at: float) -> list[Label]:
    """Draw the edge of stability and shade the region above it; return the label of its line."""
    low, high = ax.get_ylim()
    ax.axhspan(at, max(high, at), color=RED, alpha=0.07, linewidth=0)
    ax.axhline(at, color=RED, linewidth=0.9)
    ax.set_ylim(low, high)
    return [(at, "edge", RED)]


def mark_failures(ax: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """Draw a cross on the axis where a measurement failed: a gap alone is easily overlooked."""
    failed = [step for step, value in zip(steps, values) if math.isnan(value)]
    look: dict[str, Any] = {"marker": "x", "markersize": 4, "linestyle": "", "color": GREY, "clip_on": False}
    if failed:  # an empty line that is not clipped takes up room in the layout
        ax.plot(failed, np.zeros(len(failed)), transform=ax.get_xaxis_transform(), **look)


def label_lines(ax: Axes, labels: Sequence[Label]) -> None:
    """Write the names of lines at their right ends, moved apart as little as possible where they would overlap."""
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [(float(to_axes.transform((1.0, label[0]))[1]), label) for label in labels if math.isfinite(label[0])]
    heights.sort(key=lambda height: height[0])
    ends, labels = [min(max(height, 0.0), 1.0) for height, _ in heights], [label for _, label in heights]
    # Pooling neighbours that are too close, each pool around the mean of its places, is the least squares solution.
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(ends):
        mean, n = place - i * LINE, 1
        while pools and pools[-1][0] >= mean:
            other, m = pools.pop()
            mean, n = (n * mean + m * other) / (n + m), n + m
        pools.append((mean, n))
    places = [mean for mean, n in pools for _ in range(n)]
    if (rest := 1 - LINE * len(labels)) > 0:  # they fit beside the panel
        places = [min(max(place, LINE / 2), rest + LINE / 2) for place in places]
    for i, (_, name, colour) in enumerate(labels):
        place = places[i] + i * LINE
        ax.plot([1.0, 1.018], [ends[i], place], transform=ax.transAxes, color=colour, linewidth=0.5, clip_on=False)[
            0
        ].set_in_layout(False)
        short = name if len(name) <= 24 else "…" + name[-22:].lstrip(".")
        ax.annotate(
            short, (1.018, place), xycoords="axes fraction", xytext=(2, 0), textcoords="offset points", va="center",
            color=colour, fontsize=7, annotation_clip=False,
        )  # fmt: skip
