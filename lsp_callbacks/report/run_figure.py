"""Figure of a run: which of its curves are drawn, in which panels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lsp_callbacks.monitor.courant_source import COURANT, SOURCE
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.plots.figure import GREY, STYLE, load
from lsp_callbacks.plots.labels import EVENTS, mark_events
from lsp_callbacks.plots.layers import draw_layers
from lsp_callbacks.plots.panels import Line, draw_courant, draw_exponent, draw_loss, draw_number, draw_sharpness
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.quantities.tables import registry, stated_keys
from lsp_callbacks.report.curves import (
    AVERAGE,
    INITIAL,
    SMOOTHING,
    averaged,
    centred_median,
    latest,
    readings,
    smoothing_window,
)
from lsp_callbacks.report.sentence import e_folding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lsp_callbacks.quantities import Quantity

#: Readings that are few, and panels of quantities that have none of their own.
FEW, OTHERS = 2, 8
#: Height of a panel, and what draws it.
Panel = tuple[float, "Callable[[Axes], None]"]


def figure(
    history: Mapping[str, Curve],
    loss: tuple[Sequence[int], Sequence[float]] | None = None,
    events: Mapping[str, int | None] | None = None,
) -> Figure:
    """Draw the curves of a run over its optimizer steps: the loss, and what was measured.

    The Courant numbers, the exponent, the sharpness, the gains of blocks and the norms of layers have panels of their
    own; of each other quantity the first number, of the first so many. More than eight layers are a map of colours.

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
    panels = [
        *_loss_panel(loss), *_courant_panel(history), *_exponent_panel(history), *_sharpness_panel(history),
        *_layer_panels(history), *_other_panels(history),
    ]  # fmt: skip
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
        axes[-1].xaxis.set_major_locator(load("matplotlib.ticker").MaxNLocator(6, integer=True))
        axes[-1].xaxis.set_major_formatter(load("matplotlib.ticker").StrMethodFormatter("{x:,.0f}"))
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
    window = smoothing_window(len(values), max(1, SMOOTHING // stride))
    median = centred_median(values, window)
    remark = f"thick: median of {max(SMOOTHING, window * stride):,} steps, last {np.median(values[-window:]):.3g}"
    return [(1.1, partial(draw_loss, steps=steps, values=values, median=median, initial=INITIAL, remark=remark))]


def _courant_panel(history: Mapping[str, Curve]) -> list[Panel]:
    if not readings(history.get(COURANT)):
        return []
    courant, prefix = history[COURANT], f"{COURANT}_"
    errors = {PREFIX + name for name, key in stated_keys().items() if key.error_of} | {SOURCE}
    shown = {k: c for k, c in history.items() if k.startswith(prefix) and k not in errors and readings(c)}
    others = {k.removeprefix(PREFIX): _mean(c) for k, c in shown.items() if not _is_same(c, courant)}
    of = smoothing_window(len(courant.steps), AVERAGE)
    mean = averaged(courant, of)
    remark = f"thick: mean of {of} batches, last {latest(mean):.2g}"
    return [(1.1, partial(draw_courant, courant=_line(courant), mean=_line(mean), others=others, remark=remark))]


def _mean(curve: Curve) -> Line:
    """Return a curve, smoothed if it is long."""
    return _line(averaged(curve, smoothing_window(len(curve.steps), 1)))


def _is_same(a: Curve, b: Curve) -> bool:
    """Return whether two curves are equal; NaN equals NaN."""
    return a.steps == b.steps and np.array_equal(a.values, b.values, equal_nan=True)


def _exponent_panel(history: Mapping[str, Curve]) -> list[Panel]:
    if not readings(history.get("stability/lyapunov")):
        return []
    curve, lower, upper = (history.get(f"stability/lyapunov{side}", Curve()) for side in ("", "_lower", "_upper"))
    remark = f"{'90 % bounds; ' if lower.steps else ''}at the end it {e_folding(latest(curve))}"
    exponent, low, high = (_line(each) for each in (curve, lower, upper))
    return [(_height(curve), partial(draw_exponent, exponent=exponent, lower=low, upper=high, remark=remark))]


def _sharpness_panel(history: Mapping[str, Curve]) -> list[Panel]:
    if not readings(history.get("stability/sharpness")):
        return []
    curve, limit = history["stability/sharpness"], history.get("stability/sharpness_limit", Curve())
    remark = f"last {latest(curve):.3g}"
    return [(_height(curve), partial(draw_sharpness, sharpness=_mean(curve), limit=_line(limit), remark=remark))]


def _height(curve: Curve) -> float:
    """Return the height of a panel: less for few points."""
    return 1.1 if len(curve.steps) > FEW else 0.7


def _layer_panels(history: Mapping[str, Curve]) -> list[Panel]:
    above = "above 0 a block stretches some difference, as most do"
    return [
        *_layers_of(history, "residual_gain", "Gains of residual blocks, nats", 0.0, above),
        *_layers_of(history, "spectral_norm", "Spectral norms of the layers"),
    ]


def _layers_of(
    history: Mapping[str, Curve], kind: str, title: str, level: float | None = None, remark: str = ""
) -> list[Panel]:
    prefix = f"{PREFIX}{kind}/"
    layers = {k.removeprefix(prefix): _line(c) for k, c in history.items() if k.startswith(prefix) and readings(c)}
    draw = partial(draw_layers, layers=layers, title=title, level=level, remark=remark)
    return [(1.25 if len(layers) <= 24 else 1.6, draw)] if layers else []


def _other_panels(history: Mapping[str, Curve]) -> list[Panel]:
    """Return a panel for each quantity that no other panel shows, of its first number."""
    drawn = {"sharpness", "lyapunov", "residual_gain", "spectral_norm"}
    if readings(history.get(COURANT)):
        drawn |= {name.removeprefix(PREFIX) for name in history if name.startswith(COURANT)}
    panels: list[Panel] = []
    for quantity in registry().values():
        kinds = [name.partition("/")[0] for name in quantity.KEYS]
        if drawn & {kind for kind in kinds if any(_measured(history, kind))}:
            continue
        kind = next((kind for kind in kinds if any(_measured(history, kind))), None)
        if kind is None or len(panels) == OTHERS:
            continue
        key = quantity.KEYS.get(kind)
        if key is None:
            panels += _layers_of(history, kind, f"{kind} by layer")
        else:
            curve, title = history[PREFIX + kind], f"{kind}, {key.unit}" if key.unit else kind
            draw = partial(draw_number, line=_mean(curve), title=title, edge=key.threshold)
            panels.append((0.7, partial(draw, remark=f"last {latest(curve):.3g}")))
    return panels


def _measured(history: Mapping[str, Curve], kind: str) -> Iterator[str]:
    """Yield the keys with readings of a number, or of a kind of numbers of layers."""
    for key, curve in history.items():
        if (key == PREFIX + kind or key.startswith(f"{PREFIX}{kind}/")) and readings(curve):
            yield key
