"""Drawing of the stability diagram: the exponent of SGD over learning rate and batch size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram
from lsp_callbacks.plots.figure import BLACK, ORANGE, STYLE, YELLOW, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Exponents beyond this, in nats per step, have one colour; below that share of the largest, the scale is linear.
CLIP, LINEAR = 1.0, 2e-3


def diagram_figure(
    diagram: StabilityDiagram, *, lr: float | None = None, batch_size: int | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the exponent of SGD over learning rate and batch size, with the edges of stability.

    Blue is stable, red unstable. The exponent turns positive at the black line, drawn with standard errors; the second
    moment diverges at the dashed one.

    Args:
        diagram: of `SGDStability.diagram` or `lsp_callbacks.functional.sgd.stability_diagram.stability_diagram`.
        lr: rate of the run; a star marks it where both are given.
        batch_size: of the run.
        ax: to draw into; None makes a figure.

    Returns:
        A figure without a window: ``diagram_figure(...).savefig("diagram.png")``.

    Raises:
        ImportError: without matplotlib.
    """
    with load("matplotlib").rc_context(STYLE):
        if ax is None:
            ax = load("matplotlib.figure").Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained").subplots()
        draw_stability_diagram(diagram, ax, lr=lr, batch_size=batch_size)
    figure: Any = ax.get_figure()
    return figure


def draw_stability_diagram(
    diagram: StabilityDiagram, ax: Axes, *, lr: float | None = None, batch_size: int | None = None
) -> None:
    """Draw exponents as colours over rate and batch size, the two edges as lines, the run as a star.

    Args:
        diagram: of `lsp_callbacks.functional.sgd.stability_diagram.stability_diagram`.
        ax: to draw into.
        lr: rate of the run; a star marks it where both are given.
        batch_size: of the run.

    Raises:
        ImportError: without matplotlib.
    """
    y = diagram.batch_sizes.numpy().astype(float)
    rates, sizes = _between(diagram.lrs.numpy()), _between(y)
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    _colours(diagram, ax, rates, sizes)
    critical, error, mean_square = (
        np.where(np.isfinite(values), values, np.nan)  # without an edge there is no point
        for values in (diagram.critical_lr.numpy(), diagram.critical_error.numpy(), diagram.mean_square_lr.numpy())
    )
    ax.errorbar(
        critical, y, xerr=error, color=BLACK, linewidth=1.6, marker="o", markersize=3, capsize=2, elinewidth=0.9,
        label="largest stable rate", zorder=3,
    )  # fmt: skip
    # On top: the two coincide where the noise is small.
    ax.plot(mean_square, y, color=ORANGE, linewidth=1.4, linestyle=(0, (3, 2)), label="mean-square edge", zorder=3.1)
    if lr and batch_size:
        ax.plot(
            [lr], [batch_size], linestyle="", marker="*", markersize=13, color=YELLOW, markeredgecolor=BLACK,
            markeredgewidth=0.8, zorder=4, clip_on=False, label=f"this run (rate {lr:.3g}, batch {batch_size})",
        )  # fmt: skip
        # Room around the star, where it is not among the cells.
        rates, sizes = np.append(rates, [lr / 1.3, lr * 1.3]), np.append(sizes, [batch_size / 1.3, batch_size * 1.3])
    ax.set_xlim(rates.min(), rates.max())
    ax.set_ylim(sizes.min(), sizes.max())
    ticks = [n for n in diagram.batch_sizes.tolist() if not n & (n - 1)] or diagram.batch_sizes.tolist()
    ax.set_yticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    _rates(ax)
    ax.grid(False)
    ax.set_xlabel("learning rate (parameter change per unit of gradient)")
    ax.set_ylabel("batch size (samples)")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=8, columnspacing=1.2)


def _colours(diagram: StabilityDiagram, ax: Axes, rates: np.ndarray, sizes: np.ndarray) -> None:
    """Draw one cell for each exponent, white at 0, on a logarithmic scale: stable exponents are thousandths."""
    exponents = np.ma.masked_invalid(diagram.lyapunov.numpy())
    exponents[np.isneginf(diagram.lyapunov.numpy())] = -CLIP  # super-stable; NaN stays empty
    top = min(float(np.abs(exponents).max()) or CLIP, CLIP) if exponents.count() else CLIP
    norm = load("matplotlib.colors").SymLogNorm(LINEAR * top, linscale=0.6, vmin=-top, vmax=top)
    mesh = ax.pcolormesh(rates, sizes, exponents, cmap="RdBu_r", norm=norm, shading="flat", rasterized=True)
    figure: Any = ax.get_figure()
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, extend="both" if np.abs(exponents).max() > top else "neither")
    bar.set_label("exponent, nats per step (above 0: unstable)")
    bar.outline.set_linewidth(0.5)
    bar.ax.minorticks_off()
    ticks = [top * 10.0**-k for k in range(3)]
    bar.set_ticks([*(-t for t in ticks), 0, *reversed(ticks)])
    bar.set_ticklabels([*(f"-{t:.2g}" for t in ticks), "0", *(f"{t:.2g}" for t in reversed(ticks))])


def _rates(ax: Axes) -> None:
    """Put ticks at 1, 2 and 5 times powers of ten, in plain digits; at powers alone over many decades."""
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [n * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for n in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 1:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _between(values: np.ndarray) -> np.ndarray:
    """Return the edges of cells around ascending values, geometrically half way; half an octave for one value."""
    logs = np.log(values)
    if len(logs) == 1:
        return np.exp([logs[0] - math.log(2) / 2, logs[0] + math.log(2) / 2])
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))
