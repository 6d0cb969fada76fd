"""Figure of a run: which of its curves are drawn, in which panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.plots.figure import GREY, STYLE, load
from lsp_callbacks.plots.labels import EVENTS, mark_events
from lsp_callbacks.plots.panels import Line, draw_courant, draw_exponent, draw_layers, draw_loss
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.quantities.tables import stated_keys
from lsp_callbacks.report.curves import AVERAGE, INITIAL, SMOOTHING, averaged, centred_median, latest, readings
from lsp_callbacks.report.sentence import e_folding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lsp_callbacks.quantities import Quantity

#: Height of a panel, and what draws it.
Panel = tuple[float, "Callable[[Axes], None]"]


def figure(
    history: Mapping[str, Curve],
    loss: tuple[Sequence[int], Sequence[float]] | None = None,
    events: Mapping[str, int | None] | None = None,
) -> Figure:
    """Draw the curves of a run over its optimizer steps: loss, Courant number, exponent, gains and spectral norms.

    Args:
        history: of the `StabilityMonitor`; panels without data are left out, a failed measurement is a grey cross.
        loss: steps and values of the training loss.
        events: steps to be marked, by name of the event; None is left out.

    Returns:
        A figure without a window: ``figure(...).savefig("stability.png")``.

    Raises:
        ImportError: without matplotlib.
    """
    matplotlib, new = load("matplotlib"), load("matplotlib.figure").Figure
    panels = [*_loss_panel(loss), *_courant_panel(history), *_exponent_panel(history), *_layer_panels(history)]
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
            mark_events(axes[0], axes[1:], marks, end)
        axes[-1].set_xlabel("optimizer step")
    return drawing


def quantity_figure(quantity: Quantity) -> Figure:
    """Draw the picture of a quantity in the style of the other figures.

    Args:
        quantity: with a ``picture``.

    Raises:
        ValueError: if nothing has been measured.
        ImportError: without matplotlib.
    """
    with load("matplotlib").rc_context(STYLE | {"figure.dpi": 150}):
        figure, _ = quantity.plot()
    return figure


def _line(curve: Curve) -> Line:
    return curve.steps, curve.values


def _loss_panel(loss: tuple[Sequence[int], Sequence[float]] | None) -> list[Panel]:
    if loss is None or not len(loss[0]):
        return []
    steps, values = np.asarray(loss[0]), np.asarray(loss[1], dtype=float)
    stride = max(1, round(float(np.median(np.diff(steps))))) if len(steps) > 1 else 1
    window = max(1, SMOOTHING // stride)
    median = centred_median(values, window)
    remark = f"thick: median of {SMOOTHING} steps, last {np.median(values[-window:]):.3g}"
    return [(1.1, partial(draw_loss, steps=steps, values=values, median=median, initial=INITIAL, remark=remark))]


def _courant_panel(history: Mapping[str, Curve]) -> list[Panel]:
    if not readings(history.get("stability/courant")):
        return []
    courant, prefix = history["stability/courant"], "stability/courant_"
    errors = {PREFIX + name for name, key in stated_keys().items() if key.error_of} | {"stability/courant_source"}
    shown = {k: c for k, c in history.items() if k.startswith(prefix) and k not in errors}
    others = {k.removeprefix(prefix): _line(c) for k, c in shown.items() if c != courant}
    mean = averaged(courant)
    remark = f"thick: mean of {AVERAGE} batches, last {latest(mean):.2g}"
    return [(1.1, partial(draw_courant, courant=_line(courant), mean=_line(mean), others=others, remark=remark))]


def _exponent_panel(history: Mapping[str, Curve]) -> list[Panel]:
    if not readings(history.get("stability/lyapunov")):
        return []
    curve, lower, upper = (history.get(f"stability/lyapunov{side}", Curve()) for side in ("", "_lower", "_upper"))
    remark = f"{'with 90 % bounds; ' if lower.steps else ''}at the end it {e_folding(latest(curve))}"
    exponent, low, high = (_line(each) for each in (curve, lower, upper))
    return [(1.1, partial(draw_exponent, exponent=exponent, lower=low, upper=high, remark=remark))]


def _layer_panels(history: Mapping[str, Curve]) -> list[Panel]:
    panels: list[Panel] = []
    for kind, title, level in (
        ("residual_gain", "Gains of the residual blocks, nats", 0.0),
        ("spectral_norm", "Spectral norms of the layers", None),
    ):
        prefix = f"stability/{kind}/"
        layers = {k.removeprefix(prefix): _line(c) for k, c in history.items() if k.startswith(prefix) and readings(c)}
        if layers:
            panels.append((1.25, partial(draw_layers, layers=layers, title=title, level=level)))
    return panels
