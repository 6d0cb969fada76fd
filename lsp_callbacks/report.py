"""What a run's curves say: one sentence, a table, a picture."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.monitor import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

#: Mean Courant numbers from which a run is "at the edge", and up to which: healthy full-batch training was seen at 1.2.
EDGE = (0.9, 1.25)
#: How many Courant numbers are averaged: each is one mini-batch's, and the exponent is a mean of as many windows.
AVERAGE = 5
#: Steps over which the loss is averaged, and the first steps whose mean is the initial loss.
SMOOTHING, INITIAL = 50, 5


# -- the sentence ------------------------------------------------------------------------------------------------------


def verdict(history: Mapping[str, Curve]) -> str:
    """How stable the training was when it ended, why, and what to do: one sentence.

    It speaks of *linear* stability: whether the linearised update amplifies. The exponent decides, by its lower
    confidence bound where there is one; the Courant number (mean of the last 5) tells the edge, where healthy training
    may live, from what lies beyond. NaN is never stable. "Since" counts back over measurements without a break.

    Args:
        history: of the `StabilityMonitor`.

    Example:
        >>> from lsp_callbacks import Curve
        >>> steps = [0, 50, 100]
        >>> courant = Curve(steps, [0.2, 0.3, 0.4])
        >>> print(verdict({"stability/courant": courant, "stability/lyapunov": Curve(steps, [-0.3, -0.25, -0.2])}))
        lsp_callbacks: stable at step 100 (linear stability): the Courant number is 0.3 (mean of the last 3, the edge is
        at 1) and the sharp mode shrinks by e in 5 steps (exponent -0.2); nothing to do.
        >>> courant = Curve(steps, [0.8, 2.0, 3.8])
        >>> print(verdict({"stability/courant": courant, "stability/lyapunov_lower": Curve(steps, [-0.2, 0.1, 0.25])}))
        lsp_callbacks: unstable since step 50 (linear stability): the Courant number is 2.2 (mean of the last 3, the edge
        is at 1) and the sharp mode grows by e in 4 steps (exponent +0.25, lower bound); divide the learning rate by 2.7.
        >>> print(verdict({}))
        lsp_callbacks: stability was not measured: no measurement was completed; train longer, or measure more often.
    """
    return f"lsp_callbacks: {_judge(history)}."


def _judge(history: Mapping[str, Curve]) -> str:
    lower, value = history.get("stability/lyapunov_lower", Curve()), history.get("stability/lyapunov", Curve())
    bounded = bool(_finite(lower))
    exponent = lower if bounded else value
    courants = history.get("stability/courant", Curve())
    x, courant, upper = _last(exponent), _last(averaged(courants)), _last(history.get("stability/lyapunov_upper"))
    if math.isnan(x) and math.isnan(courant):
        return _unmeasured(history, max(len(exponent.values), len(courants.values)))

    deciding, edge = (averaged(courants), EDGE[1]) if math.isnan(x) else (exponent, 0.0)
    since = _since(deciding, edge)
    at = max(step for curve in (exponent, courants) for step, v in zip(curve.steps, curve.values) if not math.isnan(v))
    failed = {len(nans): curve.steps[-len(nans)] for curve in (exponent, courants) if (nans := _trailing_nans(curve))}
    numbers = " and ".join(filter(None, (_say_courant(courants), _say_exponent(x, bounded))))
    remedy = (
        f"divide the learning rate by {max(courant / 0.8, 1.2):.2g}" if courant > EDGE[0] else "halve the learning rate"
    )

    if since is not None and not EDGE[0] <= courant <= EDGE[1]:
        hidden = ", though no single batch shows it in its curvature" if courant < EDGE[0] else ""
        after = f"; what was measured after step {at} is NaN" if failed else ""
        return f"unstable since step {since} (linear stability): {numbers}{hidden}{after}; {remedy}"
    if failed:
        return (
            f"stability is unknown since step {min(failed.values())}: the last {_measurements(max(failed))} failed (NaN); "
            f"before, at step {at}, {numbers}; read the warning that names the reason"
        )
    if since is not None or upper > 0 >= x or courant >= EDGE[0]:
        band = f", its upper bound is {upper:+.2g}" if upper > 0 >= x else ""
        return (
            f"at the edge of stability at step {at} (linear stability): {numbers}{band}; healthy as long as the loss "
            f"falls, otherwise {remedy}"
        )
    beyond = [step for step, v in zip(deciding.steps, deciding.values) if v > edge]
    if beyond:
        return (
            f"stable at step {at} (linear stability), but not at times between steps {beyond[0]} and {beyond[-1]}: "
            f"{numbers}; see that the loss has recovered"
        )
    return f"stable at step {at} (linear stability): {numbers}; nothing to do"


def _unmeasured(history: Mapping[str, Curve], tried: int) -> str:
    if tried:
        return (
            f"stability was not measured: {_measurements(tried)} failed (NaN); read the warning that names the reason"
        )
    if not history:
        return "stability was not measured: no measurement was completed; train longer, or measure more often"
    kinds = {
        "stability/spectral_norm_max": "the largest spectral norm of a layer is {:.3g}",
        "stability/residual_stiffness_max": "the stiffest residual block has {:.2g} (above 1 it expands)",
    }
    known = [text.format(number) for key, text in kinds.items() if not math.isnan(number := _last(history.get(key)))]
    return (
        "the stability of the update was not measured (no Courant number, no exponent)"
        + (f": {' and '.join(known)}, which does not tell whether the learning rate is too large" if known else "")
        + "; if you did not choose that, the warning when training began says why"
    )


def _say_courant(courants: Curve) -> str:
    of = min(len(_finite(courants)), AVERAGE)
    mean = f"mean of the last {of}, " if of > 1 else ""
    return f"the Courant number is {_last(averaged(courants)):.2g} ({mean}the edge is at 1)" if of else ""


def _say_exponent(x: float, bounded: bool) -> str:
    bound = ", lower bound" if bounded else ""
    return "" if math.isnan(x) else f"the sharp mode {e_folding(x)} (exponent {x:+.2g}{bound})"


def e_folding(exponent: float) -> str:
    """An exponent in words.

    Example:
        >>> e_folding(0.25), e_folding(-0.001), e_folding(0.0)
        ('grows by e in 4 steps', 'shrinks by e in 1,000 steps', 'keeps its size')
    """
    if abs(exponent) < 1e-6:
        return "keeps its size"
    steps = 1 / abs(exponent)
    return (
        f"{'grows' if exponent > 0 else 'shrinks'} by e in {f'{steps:,.0f}' if steps >= 10 else f'{steps:.2g}'} steps"
    )


def _measurements(n: int) -> str:
    return f"{n} measurements" if n > 1 else "measurement"


def averaged(curve: Curve, of: int = AVERAGE) -> Curve:
    """Each value with up to ``of - 1`` before it, NaN left out of the mean and kept where it is."""
    means, seen = [], []
    for value in curve.values:
        seen = seen if math.isnan(value) else [*seen, value][-of:]
        means.append(value if math.isnan(value) else sum(seen) / len(seen))
    return Curve(list(curve.steps), means)


def _finite(curve: Curve | None) -> list[float]:
    """All but NaN: an infinite number is a reading."""
    return [] if curve is None else [value for value in curve.values if not math.isnan(value)]


def _last(curve: Curve | None) -> float:
    return next(reversed(_finite(curve)), math.nan)


def _trailing_nans(curve: Curve) -> list[float]:
    return curve.values[max((i + 1 for i, value in enumerate(curve.values) if not math.isnan(value)), default=0) :]


def _since(curve: Curve, edge: float) -> int | None:
    """First step of the unbroken run above the edge that reaches to the last measurement."""
    since = None
    for step, value in zip(reversed(curve.steps), reversed(curve.values)):
        if value <= edge:
            break
        since = since if math.isnan(value) else step
    return since


# -- the loss ----------------------------------------------------------------------------------------------------------


def loss_alarm(values: Sequence[float], *, window: int = SMOOTHING) -> int | None:
    """Where a loss alarm would have gone off, to compare with.

    The mean of the last ``window`` losses (of all, before there are so many) is above twice its own least value so far
    *and* above a quarter of the initial loss, the mean of the first 5; or a loss is not finite. Without the second
    condition, noise sets it off once a small data set is memorised. Twice the best means nothing for losses that can be
    negative: of these, only the ones that are not finite count.

    Args:
        values: one a step.
        window: steps of the mean.

    Returns:
        The index of the value, or None.

    Example:
        >>> loss_alarm([2.0] * 50 + [1.0] * 50 + [5.0] * 50)  # 1 + 4 n / 50 > 2
        112
        >>> loss_alarm([2.0] * 100)
    """
    losses = np.asarray(values, dtype=float)
    broken = np.flatnonzero(~np.isfinite(losses))
    end = int(broken[0]) if len(broken) else len(losses)
    means = trailing_mean(losses[:end], window)
    if end >= INITIAL and losses[:end].min() >= 0:
        means[: INITIAL - 1] = means[INITIAL - 1]
        threshold = np.maximum(2 * np.minimum.accumulate(means), 0.25 * means[0])
        above = np.flatnonzero(means > threshold)
        if len(above):
            return int(above[0])
    return end if len(broken) else None


def trailing_mean(values: Any, window: int) -> np.ndarray:
    """The mean of each value and up to ``window - 1`` before it."""
    values = np.asarray(values, dtype=float)
    padded = np.concatenate([np.zeros(window - 1), values])
    # Sums of windows, not differences of running sums: a loss of 1e20 would swallow all that come after it.
    sums = np.lib.stride_tricks.sliding_window_view(padded, window).sum(-1)
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


# -- the table ---------------------------------------------------------------------------------------------------------

_MEANINGS = {
    "courant": "rate / largest stable rate; 1 is the edge",
    "courant_gd": "the same, by the curvature of one batch",
    "sharpness": "largest Hessian eigenvalue of the step's loss",
    "sharpness_limit": "the sharpness that this rate can bear",
    "lyapunov": "growth of the sharp mode, nats a step; > 0 amplifies",
    "lyapunov_lower": "its one-sided 90 % bound",
    "lyapunov_upper": "its one-sided 90 % bound",
    "lyapunov_trajectory": "leading exponent over all parameters, nats a step",
    "lyapunov_trajectory_error": "its standard error",
    "spectral_norm_max": "largest norm of a layer as an operator",
    "spectral_log_sum": "sum of the layers' log norms, nats",
    "residual_stiffness_max": "stiffest residual block; > 1 expands",
    "residual_cfl_max": "h / h_max of the blocks that are dissipative",
    "residual_dissipative": "share of such blocks",
}
_EDGES = {"courant": 1.0, "courant_gd": 1.0, "lyapunov": 0.0, "lyapunov_lower": 0.0, "residual_stiffness_max": 1.0}
_ERRORS = {
    "sharpness": "sharpness_residual", "spectral_norm_max": "spectral_norm_residual",
    "residual_stiffness_max": "residual_residual",
}  # fmt: skip


def table(history: Mapping[str, Curve]) -> Table:
    """What was measured, one row a quantity; of what is measured by layer, the three largest.

    Args:
        history: of the `StabilityMonitor`.

    Raises:
        ImportError: without rich.
    """
    curves = {key.removeprefix("stability/"): curve for key, curve in history.items()}
    if curves.get("courant") == curves.get("courant_gd"):
        curves.pop("courant_gd", None)
    errors = {of: _last(curves.pop(name, None)) for of, name in _ERRORS.items()}
    names = [name for name in curves if "/" not in name]
    rows = _load("rich.table").Table(title="Stability", title_justify="left", box=_load("rich.box").SIMPLE_HEAD)
    rows.add_column("quantity", no_wrap=True)
    for column in ("last", "min", "max", "step"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("meaning")
    for name in sorted(names, key=lambda name: list(_MEANINGS).index(name) if name in _MEANINGS else len(_MEANINGS)):
        finite, last = _finite(curves[name]), _last(curves[name])
        numbers = [last, min(finite, default=math.nan), max(finite, default=math.nan)]
        meaning = _MEANINGS.get(name, "")
        if not math.isnan(error := errors.get(name, math.nan)):
            meaning += f" (residual {error:.1%})"
        if failed := len(curves[name].values) - len(finite):
            meaning += f" [yellow]({failed} x NaN)[/]"
        colour = "red" if last > _EDGES.get(name, math.inf) else "bold"
        cells = [f"{number:.3g}" for number in numbers]
        rows.add_row(name, f"[{colour}]{cells[0]}[/]", *cells[1:], f"{curves[name].steps[-1]}", meaning)
    for kind in dict.fromkeys(name.split("/")[0] for name in curves if "/" in name):
        layers = {name.removeprefix(kind + "/"): curve for name, curve in curves.items() if name.startswith(kind + "/")}
        lasts = sorted(((_last(curve), layer) for layer, curve in layers.items() if _finite(curve)), reverse=True)
        if lasts:
            largest = ", ".join(f"{layer} {value:.3g}" for value, layer in lasts[:3])
            cells = [f"{value:.3g}" for value in (lasts[-1][0], lasts[0][0])]
            meaning = f"{largest}{f' (of {len(lasts)})' if len(lasts) > 3 else ''}"
            rows.add_row(
                f"{kind}/...", "", *cells, f"{max(c.steps[-1] for c in layers.values())}", meaning, style="dim"
            )
    return rows


def show(history: Mapping[str, Curve]) -> None:
    """Prints the table; where there is no terminal to fit into, wide enough for it."""
    console = _load("rich.console").Console()
    if not console.is_terminal:
        console.width = 130
    console.print(table(history))


def check_installed() -> None:
    """Says early that something is missing.

    Raises:
        ImportError: without matplotlib or rich.
    """
    for module in ("matplotlib", "rich"):
        _load(module)


# -- the picture -------------------------------------------------------------------------------------------------------

# Okabe & Ito's colours: safe for colour-blind readers.
_BLUE, _GREEN, _ORANGE, _RED, _GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#6b6b6b"
_STYLE = {
    "font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7, "lines.solid_capstyle": "round", "axes.edgecolor": "#4a4a4a", "xtick.color": "#4a4a4a",
    "ytick.color": "#4a4a4a", "axes.titlelocation": "left", "axes.titlesize": 9, "axes.titleweight": "bold",
    "axes.titlepad": 4,
}  # fmt: skip
_EVENT_STYLES = ((_ORANGE, (0, (5, 2))), ("#CC79A7", (0, (1, 1.2))), (_RED, "solid"), (_GREY, (0, (3, 1, 1, 1))))
#: How many layers are named in a panel; the others are drawn in grey.
_NAMED = 8


def figure(
    history: Mapping[str, Curve],
    loss: tuple[Sequence[int], Sequence[float]] | None = None,
    events: Mapping[str, int | None] | None = None,
) -> Figure:
    """The curves of a run over its optimizer steps: loss, Courant number, exponent, stiffness and spectral norms.

    Args:
        history: of the `StabilityMonitor`; panels without data are left out.
        loss: steps and values of the training loss.
        events: steps to be marked, by what happened there; None is left out.

    Returns:
        A figure without a window: ``figure(...).savefig("stability.png")``.

    Raises:
        ImportError: without matplotlib.
    """
    matplotlib = _load("matplotlib")
    draw: list[tuple[Any, float]] = []
    if loss is not None and len(loss[0]):
        draw.append((lambda ax: _loss_panel(ax, *loss), 1.15))
    if _finite(history.get("stability/courant")):
        draw.append((lambda ax: _courant_panel(ax, history), 1.15))
    if _finite(history.get("stability/lyapunov")):
        draw.append((lambda ax: _exponent_panel(ax, history), 1.15))
    for kind, title, edge in (
        ("residual_stiffness", "Stiffness of the residual blocks", 1.0),
        ("spectral_norm", "Spectral norms of the layers", None),
    ):
        prefix = f"stability/{kind}/"
        layers = {k.removeprefix(prefix): c for k, c in history.items() if k.startswith(prefix) and _finite(c)}
        if layers:
            draw.append((lambda ax, layers=layers, title=title, edge=edge: _layers_panel(ax, layers, title, edge), 1.3))
    marks = {text: step for text, step in (events or {}).items() if step is not None}
    last = max([c.steps[-1] for c in history.values() if c.steps] + [int(loss[0][-1]) if loss and len(loss[0]) else 1])
    with matplotlib.rc_context(_STYLE):
        size = 1.45 * sum(height for _, height in draw) + 0.5 + 0.17 * len(marks)
        drawing = _load("matplotlib.figure").Figure(figsize=(7.6, max(size, 1.0)), dpi=150, layout="constrained")
        if not draw:
            drawing.text(0.5, 0.5, "nothing was measured", ha="center", va="center", color=_GREY)
            return drawing
        ratios = [0.12 * len(marks)] * bool(marks) + [height for _, height in draw]
        axes = list(drawing.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
        axes[0].set_xlim(-0.01 * last, 1.01 * last)
        if marks:
            _mark(axes[0], axes[1:], marks, last)
        for ax, (panel, _) in zip(axes[bool(marks) :], draw):
            panel(ax)
        axes[-1].set_xlabel("optimizer step")
        drawing.align_ylabels()
    return drawing


def _mark(strip: Axes, panels: Sequence[Axes], marks: Mapping[str, int], last: int) -> None:
    """Vertical lines through all panels, with their labels in a strip above them, one line of text each."""
    strip.axis("off")
    strip.set_ylim(0, len(marks))
    for i, (text, step) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        colour, dashes = _EVENT_STYLES[min(i, len(_EVENT_STYLES) - 1)]
        right = step > 0.6 * last
        top = len(marks) - i
        strip.plot([step, step], [-0.5, top - 0.1], color=colour, linestyle=dashes, linewidth=1.3, clip_on=False)
        strip.annotate(
            f"{text}, step {step}", (step, top - 0.45), xytext=(-4 if right else 4, 0), textcoords="offset points",
            ha="right" if right else "left", va="center", fontsize=8,
        )  # fmt: skip
        for ax in panels:
            ax.axvline(step, color=colour, linestyle=dashes, linewidth=1.3, zorder=1.5)


def _loss_panel(ax: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    x, y = np.asarray(steps), np.asarray(values, dtype=float)
    every = max(float(np.median(np.diff(x))), 1.0) if len(x) > 1 else 1.0
    smooth = trailing_mean(y, max(1, round(SMOOTHING / every)))
    ax.plot(x, y, color=_BLUE, alpha=0.35, linewidth=0.6)
    ax.plot(x, smooth, color=_BLUE, linewidth=1.8)
    shown = y[np.isfinite(y)]
    if len(shown):
        # An explosion to 1e20 would hide all that came before.
        low, high = shown.min(), min(shown.max(), 100 * max(float(np.abs(shown[:INITIAL]).mean()), 1e-12))
        if low > 0 and high > 8 * low:
            ax.set_yscale("log")
            ax.set_ylim(low / 1.2, high * 1.2)
        else:
            ax.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    _title(ax, "Training loss", f"thick: mean of {SMOOTHING} steps, at last {_number(smooth[-1])}")


def _courant_panel(ax: Axes, history: Mapping[str, Curve]) -> None:
    curve = history["stability/courant"]
    mean = averaged(curve)
    ax.plot(curve.steps, curve.values, color=_BLUE, alpha=0.4, linewidth=0.7, marker="o", markersize=2)
    ax.plot(mean.steps, mean.values, color=_BLUE, linewidth=1.8)
    others = {
        key.removeprefix("stability/courant_"): other
        for key, other in history.items()
        if key.startswith("stability/courant_") and other.values != curve.values
    }
    colours = (_GREEN, "#CC79A7", _ORANGE)
    ends = [(other.values[-1], name, colours[i % 3]) for i, (name, other) in enumerate(others.items())]
    for (_, _, colour), other in zip(ends, others.values()):
        ax.plot(other.steps, other.values, color=colour, linewidth=1.2)
    shown = [v for c in (curve, *others.values()) for v in c.values if math.isfinite(v)]
    positive = [v for v in shown if v > 0] or [1.0]
    if max(positive) > 8:
        ax.set_yscale("log")
        ax.set_ylim(max(min(positive), 1e-2) / 1.3, min(max(positive), 1e3) * 1.3)
    else:
        ax.set_ylim(min(0.0, *shown), max(1.2, 1.08 * max(positive)))
    _edge(ax, 1.0)
    _failures(ax, curve)
    _label_ends(ax, [(float(_last(mean)), "dial", _BLUE), *ends] if others else [])
    _title(ax, "Courant number", f"thick: mean of {AVERAGE} batches, at last {_number(_last(mean))}")


def _exponent_panel(ax: Axes, history: Mapping[str, Curve]) -> None:
    curve = history["stability/lyapunov"]
    lower, upper = (history.get(f"stability/lyapunov_{side}", Curve()) for side in ("lower", "upper"))
    ax.plot(curve.steps, curve.values, color=_GREEN, linewidth=1.8, marker="o" if len(curve.steps) < 4 else None, ms=3)
    if lower.steps == upper.steps:
        ax.fill_between(lower.steps, lower.values, upper.values, color=_GREEN, alpha=0.22, linewidth=0)
    shown = [v for v in (*curve.values, *lower.values, *upper.values) if math.isfinite(v)] or [0.0]
    low, high = min(shown), max(shown)
    margin = 0.08 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, max(high + margin, 0.25 * (high - low) + margin if high < 0 else 0.0, margin))
    _edge(ax, 0.0)
    _failures(ax, curve)
    _title(ax, "Sharp-mode exponent (nats per step)", f"with its 90 % bounds; at last it {e_folding(_last(curve))}")


def _layers_panel(ax: Axes, layers: Mapping[str, Curve], title: str, edge: float | None) -> None:
    named = sorted(layers, key=lambda layer: -_last(layers[layer]))[:_NAMED]
    named = [layer for layer in layers if layer in named]  # the order of depth gives the colours
    shades = _load("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.85, max(len(named), 2)))
    for layer, curve in layers.items():
        colour = shades[named.index(layer)] if layer in named else "#c4c4c4"
        ax.plot(curve.steps, curve.values, color=colour, linewidth=1.2 if layer in named else 0.6,
                marker="o" if len(curve.steps) < 4 else None, ms=3, zorder=2.5 if layer in named else 2)  # fmt: skip
    shown = [v for curve in layers.values() for v in curve.values if math.isfinite(v)] or [0.0]
    low, high = min(shown), max(shown)
    if low > 0 and high > 30 * low:
        ax.set_yscale("log")
    else:
        span = max(high - low, 0.05 * abs(high), 1e-6)
        ax.set_ylim(low - 0.1 * span, high + 0.1 * span)
    if edge is not None and high > 0.6 * edge:
        ax.set_ylim(top=max(ax.get_ylim()[1], 1.15 * edge))
        _edge(ax, edge)
    _label_ends(ax, [(_last(layers[layer]), layer, shades[named.index(layer)]) for layer in named])
    others = len(layers) - len(named)
    note = "" if edge is None else "above 1 a block expands"
    _title(ax, title, f"the {_NAMED} largest; {others} more in grey" if others else note)


def _title(ax: Axes, title: str, remark: str) -> None:
    ax.set_title(title)
    ax.set_title(remark, loc="right", color=_GREY, fontsize=8, fontweight="normal")


def _edge(ax: Axes, at: float) -> None:
    """The edge of stability, and what lies above it."""
    top = ax.get_ylim()[1]
    ax.axhspan(at, max(top, at), color=_RED, alpha=0.07, linewidth=0)
    ax.axhline(at, color=_RED, linewidth=0.9)


def _failures(ax: Axes, curve: Curve) -> None:
    """A cross on the axis where a measurement failed: a gap alone is easily overlooked."""
    failed = [step for step, value in zip(curve.steps, curve.values) if math.isnan(value)]
    if failed:
        ax.plot(failed, np.zeros(len(failed)), transform=ax.get_xaxis_transform(), marker="x", markersize=4, linestyle="",
                color=_GREY, clip_on=False)  # fmt: skip


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, Any]]) -> None:
    """The names of the lines at their right ends, pushed apart where they would overlap."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0])
    wanted = [float(ax.transAxes.inverted().transform(ax.transData.transform((1.0, value)))[1]) for value, _, _ in ends]
    gap = 0.098
    places = np.clip(np.asarray(wanted), 0.0, 1.0)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    overflow = places[-1] - max(1.0, places[0])
    if overflow > 0:
        places -= overflow
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    for place, (_, name, colour) in zip(places, ends):
        short = name if len(name) <= 24 else "..." + name[-22:]
        ax.annotate(short, (1.0, place), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points", va="center",
                    color=colour, fontsize=7, annotation_clip=False)  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.3g}"


def _load(module: str) -> Any:
    """A module of matplotlib or rich, which are not needed until something is shown."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"a report needs {module.split('.')[0]}, which is not installed: pip install 'lsp-callbacks[report]'"
        ) from error
