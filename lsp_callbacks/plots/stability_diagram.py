"""The stability diagram around a run, and how it is drawn: needed by `SGDStability.plot` and by reports alike."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lsp_callbacks.functional.sgd.mean_square import gd_critical_lr, mean_square_lr
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram, stability_diagram
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLACK, ORANGE, YELLOW = "#1a1a1a", "#E69F00", "#F0E442"
#: Rates of a diagram: at least so many, and so many a decade.
RATES, A_DECADE = 24, 12
#: Exponents beyond this, in nats per step, have one colour; below that share of the largest, the scale is linear.
CLIP, LINEAR = 1.0, 2e-3


def diagram_around(found: FrozenSGD, **settings: Any) -> StabilityDiagram:
    """The stability diagram of a frozen step, with rates and batch sizes that have the step's own among them.

    Args:
        found: of `lsp_callbacks.operators.sgd.frozen_sgd.frozen_sgd`.
        settings: of `lsp_callbacks.functional.sgd.stability_diagram.stability_diagram`.

    Raises:
        ValueError: if the network is collapsed (rank 0).
    """
    modes, rule, total = found.modes, found.rule, found.population
    most, own = min(total, 4 * modes.samples), min(found.batch_size, total)
    sizes = sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {own})
    # From the edge of the noisiest batch to that of no noise at all: cheap bounds of all that is searched later.
    edges = [mean_square_lr(modes, batch_size=1, rule=rule, population=total), gd_critical_lr(modes, rule), found.lr]
    known = [rate for rate in edges if 0 < rate < math.inf]
    lrs = None
    if modes.rank and len(known) > 1:
        low, high = math.log10(min(known) / 2), math.log10(max(known) * 2)
        count = max(RATES, round(A_DECADE * (high - low)))
        lrs = torch.logspace(low, high, count, dtype=torch.float64)
    chosen: dict[str, Any] = {"rule": rule, "population": total, "lrs": lrs, "batch_sizes": sizes}
    return stability_diagram(modes, **(chosen | settings))


def draw(diagram: StabilityDiagram, ax: Axes, *, lr: float | None = None, batch_size: int | None = None) -> None:
    """Exponents as colours over rate and batch size, the two edges as lines, the run as a star.

    Args:
        diagram: of `lsp_callbacks.functional.sgd.stability_diagram.stability_diagram`.
        ax: to draw into.
        lr: rate of the run; it is marked where both are known.
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
        np.where(np.isfinite(values), values, np.nan)  # no edge: nothing to draw
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
    """One cell a measurement, white at 0; the scale is logarithmic, as stable exponents are thousandths."""
    exponents = np.ma.masked_invalid(diagram.lyapunov.numpy())
    exponents[np.isneginf(diagram.lyapunov.numpy())] = -CLIP  # super-stable; NaN stays a hole
    top = min(float(np.abs(exponents).max()) or CLIP, CLIP) if exponents.count() else CLIP
    norm = matplotlib("matplotlib.colors").SymLogNorm(LINEAR * top, linscale=0.6, vmin=-top, vmax=top)
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
    """Ticks at 1, 2 and 5 times powers of ten, in plain digits; powers alone over many decades."""
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [n * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for n in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 1:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _between(values: np.ndarray) -> np.ndarray:
    """The edges of cells around ascending values, geometrically half way; half an octave where there is one value."""
    logs = np.log(values)
    if len(logs) == 1:
        return np.exp([logs[0] - math.log(2) / 2, logs[0] + math.log(2) / 2])
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))


def matplotlib(module: str) -> Any:
    """A module of matplotlib, which is not needed until something is drawn."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'lsp-callbacks[report]'") from error
