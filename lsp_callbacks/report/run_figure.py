"""A picture of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.report.curves import AVERAGE, INITIAL, SMOOTHING, averaged, centred_median, latest, load, readings
from lsp_callbacks.report.sentence import e_folding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lsp_callbacks.quantities import Quantity

# Okabe & Ito's colours: safe for colour-blind readers.
BLUE, GREEN, ORANGE, RED, PURPLE, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#6b6b6b"
STYLE = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.edgecolor": "#4a4a4a",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8e8e8", "grid.linewidth": 0.6,
    "xtick.color": "#4a4a4a", "ytick.color": "#4a4a4a", "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "lines.solid_capstyle": "round",
}  # fmt: skip
#: Events differ in colour and in dashes.
EVENTS = ((ORANGE, (0, (5, 2))), (PURPLE, (0, (1, 1.2))), (RED, "solid"), (GREY, (0, (3, 1, 1, 1))))
#: How many layers are named in a panel; the others are drawn in grey.
NAMED = 6
#: Height of a line of labels, as a share of a panel's.
LINE = 0.085

Label = tuple[float, str, Any]


def figure(
    history: Mapping[str, Curve],
    loss: tuple[Sequence[int], Sequence[float]] | None = None,
    events: Mapping[str, int | None] | None = None,
) -> Figure:
    """The curves of a run over its optimizer steps: loss, Courant number, exponent, gains and spectral norms.

    Args:
        history: of the `StabilityMonitor`; panels without data are left out, a failed measurement is a grey cross.
        loss: steps and values of the training loss.
        events: steps to be marked, by what happened there; None is left out.

    Returns:
        A figure without a window: ``figure(...).savefig("stability.png")``.

    Raises:
        ImportError: without matplotlib.
    """
    matplotlib, new = load("matplotlib"), load("matplotlib.figure").Figure
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if loss is not None and len(loss[0]):
        x, y = np.asarray(loss[0]), np.asarray(loss[1], dtype=float)
        panels.append((1.1, partial(_loss, steps=x, values=y)))
    if readings(history.get("stability/courant")):
        panels.append((1.1, partial(_courant, history=history)))
    if readings(history.get("stability/lyapunov")):
        panels.append((1.1, partial(_exponent, history=history)))
    for kind, title, level in (
        ("residual_gain", "Gains of the residual blocks, nats", 0.0),
        ("spectral_norm", "Spectral norms of the layers", None),
    ):
        prefix = f"stability/{kind}/"
        layers = {k.removeprefix(prefix): c for k, c in history.items() if k.startswith(prefix) and readings(c)}
        if layers:
            panels.append((1.25, partial(_layers, layers=layers, title=title, level=level)))

    marks = [(s, text, EVENTS[min(i, 3)]) for i, (text, s) in enumerate((events or {}).items()) if s is not None]
    ends = [curve.steps[-1] for curve in history.values() if curve.steps]
    end = max([1, *ends, *(loss[0][-1:] if loss is not None else [])])
    with matplotlib.rc_context(STYLE):
        heights = [0.13 * len(marks)] * bool(marks) + [height for height, _ in panels]
        drawing = new(figsize=(7.6, 0.5 + 1.5 * max(sum(heights), 0.5)), dpi=150, layout="constrained")
        if not panels:
            drawing.text(0.5, 0.5, "nothing was measured", ha="center", va="center", color=GREY)
            return drawing
        axes = list(drawing.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
        axes[0].set_xlim(-0.01 * end, 1.01 * end)
        for ax, (_, draw) in zip(axes[bool(marks) :], panels):
            draw(ax)
        if marks:
            _mark(axes[0], axes[1:], marks, end)
        axes[-1].set_xlabel("optimizer step")
    return drawing


def drawn(quantity: Quantity) -> Figure:
    """What a quantity has to show, in the style of the other pictures.

    Args:
        quantity: with a ``picture``.

    Raises:
        ValueError: if it has nothing to show.
        ImportError: without matplotlib.
    """
    with load("matplotlib").rc_context(STYLE | {"figure.dpi": 150}):
        figure, _ = quantity.plot()
    return figure


def _mark(strip: Axes, panels: Sequence[Axes], marks: Sequence[tuple[int, str, Any]], end: int) -> None:
    """Vertical lines through all panels, named in a strip above them, each in a row of its own."""
    strip.axis("off")
    strip.set_ylim(len(marks), 0)
    # Names to the right of their lines come first, the rightmost of those to the left next: so few lines cross a name.
    rows = sorted(marks, key=lambda mark: mark[0] if mark[0] < 0.6 * end else 2 * end - mark[0])
    for row, (step, text, (colour, dashes)) in enumerate(rows):
        line = {"color": colour, "linestyle": dashes, "linewidth": 1.3}
        left = step >= 0.6 * end
        strip.plot([step, step], [row + 0.1, len(marks)], zorder=1, **line)
        name = strip.annotate(
            f"{text}, step {step}", (step, row + 0.5), xytext=(-5 if left else 5, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        name.set_in_layout(False)  # it may reach beyond the strip, which keeps its height
        for ax in panels:
            ax.axvline(step, zorder=1.5, **line)


def _loss(ax: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    stride = max(1, round(float(np.median(np.diff(steps))))) if len(steps) > 1 else 1
    window = max(1, SMOOTHING // stride)
    ax.plot(steps, values, color=BLUE, alpha=0.45, linewidth=0.6)
    ax.plot(steps, centred_median(values, window), color=BLUE, linewidth=1.8)
    known = values[np.isfinite(values)]
    if len(known):
        # An explosion to 1e20 would hide all that came before it.
        low, high = known.min(), min(known.max(), 100 * max(float(np.abs(known[:INITIAL]).mean()), 1e-12))
        if low > 0 and high > 8 * low:
            ax.set_yscale("log")
            ax.set_ylim(low / 1.2, high * 1.2)
        else:
            margin = 0.06 * (high - low) + 1e-9
            ax.set_ylim(low - margin, high + margin)
    _title(ax, "Training loss", f"thick: median of {SMOOTHING} steps, last {np.median(values[-window:]):.3g}")


def _courant(ax: Axes, history: Mapping[str, Curve]) -> None:
    dial = history["stability/courant"]
    mean = averaged(dial)
    ax.plot(dial.steps, dial.values, color=BLUE, alpha=0.4, linewidth=0.7, marker="o", markersize=2)
    ax.plot(mean.steps, mean.values, color=BLUE, linewidth=1.8)
    prefix = "stability/courant_"
    shown = {k: c for k, c in history.items() if k.startswith(prefix) and k != "stability/courant_source"}
    others = {k.removeprefix(prefix): c for k, c in shown.items() if c != dial}
    labels: list[Label] = []
    for (name, curve), colour in zip(others.items(), (GREEN, PURPLE, ORANGE)):
        ax.plot(curve.steps, curve.values, color=colour, linewidth=1.2)
        labels.append((latest(curve), name, colour))
    known = [v for curve in (dial, *others.values()) for v in curve.values if math.isfinite(v)] or [0.0]
    positive = [v for v in known if v > 0] or [1.0]
    if max(positive) > 8:
        ax.set_yscale("log")
        ax.set_ylim(max(min(positive), 1e-2) / 1.3, min(max(positive), 1e3) * 1.3)
    else:
        ax.set_ylim(min(0.0, *known), max(1.25, 1.08 * max(positive)))
    _label(ax, labels + _edge(ax, 1.0))
    _failures(ax, dial)
    _title(ax, "Courant number", f"thick: mean of {AVERAGE} batches, last {latest(mean):.2g}")


def _exponent(ax: Axes, history: Mapping[str, Curve]) -> None:
    curve, lower, upper = (history.get(f"stability/lyapunov{side}", Curve()) for side in ("", "_lower", "_upper"))
    ax.plot(curve.steps, curve.values, color=GREEN, linewidth=1.8, **_points(curve))
    if lower.steps == upper.steps:
        ax.fill_between(lower.steps, lower.values, upper.values, color=GREEN, alpha=0.22, linewidth=0)
    known = [v for c in (curve, lower, upper) for v in c.values if math.isfinite(v)] or [0.0]
    low, high = min(*known, 0.0), max(*known, 0.0)
    margin = 0.1 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + 2 * margin)
    _label(ax, _edge(ax, 0.0))
    _failures(ax, curve)
    band = "with 90 % bounds; " if lower.steps else ""
    _title(ax, "Sharp-mode exponent, nats per step", f"{band}at the end it {e_folding(latest(curve))}")


def _layers(ax: Axes, layers: Mapping[str, Curve], title: str, level: float | None) -> None:
    """Curves by layer, and where given the level above which one expands: a mark, no alarm."""
    largest = sorted(layers, key=lambda layer: -latest(layers[layer]))[:NAMED]
    named = [layer for layer in layers if layer in largest]  # colours follow the depth
    shades = dict(zip(named, load("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.85, max(len(named), 2)))))
    for layer, curve in layers.items():
        look = {"color": shades[layer], "linewidth": 1.3} if layer in shades else {"color": "#c4c4c4", "linewidth": 0.6}
        ax.plot(curve.steps, curve.values, **look, zorder=2.5 if layer in shades else 2, **_points(curve))
    known = [v for curve in layers.values() for v in curve.values if math.isfinite(v)] or [0.0]
    low, high = min(known), max(known)
    if level is not None:
        low, high = min(low, level), max(high, level)
        ax.axhline(level, color=GREY, linewidth=0.9, zorder=1)
    if level is None and low > 0 and high > 30 * low:
        ax.set_yscale("log")
    else:
        margin = 0.1 * max(high - low, 0.1 * abs(high), 1e-6)
        ax.set_ylim(low - margin, high + margin)
    labels: list[Label] = [(latest(layers[layer]), layer, shades[layer]) for layer in named]
    _label(ax, labels)
    rest = f"the {NAMED} largest of {len(layers)}" if len(named) < len(layers) else ""
    meaning = [] if level is None else [f"above {level:g} a block stretches some difference, as most do"]
    _title(ax, title, "; ".join([*meaning, rest] if rest else meaning))


def _title(ax: Axes, title: str, remark: str) -> None:
    ax.set_title(title)
    ax.set_title(remark, loc="right", color=GREY, fontsize=8, fontweight="normal")


def _edge(ax: Axes, at: float) -> list[Label]:
    """The edge of stability, and what lies above it; returns the label of its line."""
    low, high = ax.get_ylim()
    ax.axhspan(at, max(high, at), color=RED, alpha=0.07, linewidth=0)
    ax.axhline(at, color=RED, linewidth=0.9)
    ax.set_ylim(low, high)
    return [(at, "edge", RED)]


def _points(curve: Curve) -> dict[str, Any]:
    """Lines of few points show them."""
    return {"marker": "o", "markersize": 3} if len(curve.steps) < 5 else {}


def _failures(ax: Axes, curve: Curve) -> None:
    """A cross on the axis where a measurement failed: a gap alone is easily overlooked."""
    failed = [step for step, value in zip(curve.steps, curve.values) if math.isnan(value)]
    look: dict[str, Any] = {"marker": "x", "markersize": 4, "linestyle": "", "color": GREY, "clip_on": False}
    if failed:  # an empty line that is not clipped takes up room in the layout
        ax.plot(failed, np.zeros(len(failed)), transform=ax.get_xaxis_transform(), **look)


def _label(ax: Axes, labels: Sequence[Label]) -> None:
    """The names of lines at their right ends, moved apart as little as possible where they would overlap."""
    labels = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    to_axes = ax.transData + ax.transAxes.inverted()
    at = [min(max(float(to_axes.transform((1.0, value))[1]), 0.0), 1.0) for value, _, _ in labels]
    # Pooling neighbours that are too close, each pool around the mean of its places, is the least squares solution.
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(at):
        mean, n = place - i * LINE, 1
        while pools and pools[-1][0] >= mean:
            other, m = pools.pop()
            mean, n = (n * mean + m * other) / (n + m), n + m
        pools.append((mean, n))
    places = [mean for mean, n in pools for _ in range(n)]
    for i, (_, name, colour) in enumerate(labels):
        place = places[i] + i * LINE
        ax.plot([1.0, 1.018], [at[i], place], transform=ax.transAxes, color=colour, linewidth=0.5, clip_on=False)[
            0
        ].set_in_layout(False)
        ax.annotate(
            name if len(name) <= 24 else "..." + name[-22:], (1.018, place), xycoords="axes fraction", xytext=(2, 0),
            textcoords="offset points", va="center", color=colour, fontsize=7, annotation_clip=False,
        )  # fmt: skip
