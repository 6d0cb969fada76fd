"""How densities of eigenvalues are drawn: on an axis that is linear around 0 and logarithmic further out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.functional.curvature.marchenko_pastur import density
from lsp_callbacks.functional.curvature.spectral_density import Spectrum
from lsp_callbacks.plots.stability_diagram import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, RED = "#0072B2", "#E69F00", "#D55E00"
#: Below this share of the largest eigenvalue the axis is linear: Lanczos tells no finer details there.
LINEAR = 1e-2
#: Of the smoothing, in units of the axis, ``asinh(eigenvalue / unit)``: e-foldings, far from 0.
WIDTH = 0.25
POINTS = 400


def draw_density(found: Spectrum, ax: Axes, *, unit: float | None = None) -> None:
    """The smoothed density on a logarithmic scale, the outliers as sticks, a Marchenko-Pastur law as a dashed line.

    Args:
        found: what to draw; a law that it does not look like is not drawn.
        ax: to draw into.
        unit: below this size the axis is linear; None takes a hundredth of the largest eigenvalue.
    """
    unit = unit or axis_unit([found])
    points = _points([found], unit)
    places, heights = unit * points.sinh(), _heights(found, points, unit)
    # As high as a single eigenvalue.
    one = 1 / (found.size * WIDTH * math.sqrt(2 * math.pi))
    ax.fill_between(places, heights, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(places, heights, color=BLUE, linewidth=1.5, label=f"density, smoothed by {WIDTH:g}")
    outliers = torch.empty(0) if found.outliers is None else found.outliers
    if len(outliers):
        ax.vlines(outliers, one / 10, one, color=RED, linewidth=1.3, label=f"{len(outliers)} outliers")
    if found.fit is not None and found.fit.alike:
        law, weights = found.fit.measure()
        line = (1 - len(outliers) / found.size) * density((law / unit).asinh(), weights, points, WIDTH)
        text = f"Marchenko-Pastur, off by {found.fit.distance:.2f}"
        ax.plot(places, line, color=ORANGE, linestyle=(0, (3, 2)), linewidth=1.4, label=text)
    ax.set_yscale("log")
    ax.set_ylim(one / 10, 2 * max(float(heights.max()), one))
    _axis(ax, places, unit)
    ax.set_ylabel("density, per unit of the axis")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=8, columnspacing=1.2)


def draw_course(course: Sequence[tuple[int, Spectrum]], ax: Axes) -> None:
    """Densities as colours over eigenvalue and step of training, outliers as dots.

    Args:
        course: by step, at least two.
        ax: to draw into.
    """
    found = [each for _, each in course]
    unit = axis_unit(found)
    points = _points(found, unit)
    rows = torch.stack([_heights(each, points, unit) for each in found])
    steps = np.array([step for step, _ in course], dtype=float)
    middles = (steps[1:] + steps[:-1]) / 2
    sides = np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
    half = (points[1] - points[0]) / 2
    cells = unit * torch.cat([points - half, points[-1:] + half]).sinh()
    most, one = float(rows.max()), 1 / (found[0].size * WIDTH * math.sqrt(2 * math.pi))
    norm = matplotlib("matplotlib.colors").LogNorm(min(one / 3, most / 10), most)
    rows = rows.clamp_min(norm.vmin)
    mesh = ax.pcolormesh(cells, sides, rows, norm=norm, cmap="viridis", shading="flat", rasterized=True)
    dots = [(value, step) for step, each in course if each.outliers is not None for value in each.outliers.tolist()]
    if dots:
        values, places = zip(*dots)
        ax.scatter(values, places, s=3, color=RED, linewidths=0)
    figure: Any = ax.get_figure()
    figure.colorbar(mesh, ax=ax, pad=0.02).set_label("density")
    _axis(ax, unit * points.sinh(), unit)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("optimizer step")


def axis_unit(found: Sequence[Spectrum]) -> float:
    """Of one axis for all these densities, see `draw_density`."""
    return LINEAR * max(float(each.nodes.abs().max()) for each in found) or 1.0


def _points(found: Sequence[Spectrum], unit: float) -> Tensor:
    """A grid, even on the axis, that reaches beyond all nodes."""
    low, high = min(float(each.nodes[0]) for each in found), max(float(each.nodes[-1]) for each in found)
    beyond = 5 * WIDTH
    return torch.linspace(
        math.asinh(low / unit) - beyond, math.asinh(high / unit) + beyond, POINTS, dtype=torch.float64
    )


def _heights(found: Spectrum, points: Tensor, unit: float) -> Tensor:
    return density((found.nodes / unit).asinh(), found.weights, points, WIDTH)


def _axis(ax: Axes, places: Tensor, unit: float) -> None:
    """Powers of ten on both sides of 0."""
    ax.set_xscale("asinh", linear_width=unit)
    low, high = float(places[0]), float(places[-1])
    powers = range(math.ceil(math.log10(unit) + 0.3), math.ceil(math.log10(max(-low, high))) + 1)
    ticks = [*(-(10.0**k) for k in reversed(powers)), 0.0, *(10.0**k for k in powers)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    ax.grid(False)
