"""Drawing of densities of eigenvalues, on an axis that is linear around 0 and logarithmic further out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.functional.curvature.marchenko_pastur import smoothed_density
from lsp_callbacks.functional.curvature.spectral_density import Spectrum
from lsp_callbacks.plots.figure import BLUE, ORANGE, RED, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Below this share of the largest eigenvalue the axis is linear: Lanczos resolves no finer details there.
LINEAR = 1e-2
#: Width of the smoothing in units of the axis, ``asinh(eigenvalue / unit)``: e-foldings, far from 0.
WIDTH = 0.25
#: Points of a curve.
POINTS = 400


def draw_density(spectrum: Spectrum, ax: Axes, *, unit: float | None = None) -> None:
    """Draw a smoothed density on a logarithmic scale, outliers as sticks, a Marchenko-Pastur law as a dashed line.

    Args:
        spectrum: to be drawn; a Marchenko-Pastur law that does not fit it is left out.
        ax: to draw into.
        unit: below this size the axis is linear; None takes a hundredth of the largest eigenvalue.
    """
    unit = unit or axis_unit([spectrum])
    points = _points([spectrum], unit)
    places, heights = unit * points.sinh(), _heights(spectrum, points, unit)
    single = _single(spectrum)
    ax.fill_between(places, heights, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(places, heights, color=BLUE, linewidth=1.5, label=f"density, smoothed by {WIDTH:g}")
    outliers = torch.empty(0) if spectrum.outliers is None else spectrum.outliers
    if len(outliers):
        ax.vlines(outliers, single / 10, single, color=RED, linewidth=1.3, label=f"{len(outliers)} outliers")
    if spectrum.fit is not None and spectrum.fit.alike:
        law, weights = spectrum.fit.measure()
        line = (1 - len(outliers) / spectrum.size) * smoothed_density((law / unit).asinh(), weights, points, WIDTH)
        text = f"Marchenko-Pastur, off by {spectrum.fit.distance:.2f}"
        ax.plot(places, line, color=ORANGE, linestyle=(0, (3, 2)), linewidth=1.4, label=text)
    ax.set_yscale("log")
    ax.set_ylim(single / 10, 2 * max(float(heights.max()), single))
    _axis(ax, places, unit)
    ax.set_ylabel("density, per unit of the axis")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=8, columnspacing=1.2)


def draw_densities_over_training(history: Sequence[tuple[int, Spectrum]], ax: Axes) -> None:
    """Draw densities as colours over eigenvalue and step of training, outliers as dots.

    Args:
        history: spectra by step, at least two.
        ax: to draw into.
    """
    spectra = [spectrum for _, spectrum in history]
    unit = axis_unit(spectra)
    points = _points(spectra, unit)
    rows = torch.stack([_heights(spectrum, points, unit) for spectrum in spectra])
    steps = np.array([step for step, _ in history], dtype=float)
    middles = (steps[1:] + steps[:-1]) / 2
    sides = np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
    half = (points[1] - points[0]) / 2
    cells = unit * torch.cat([points - half, points[-1:] + half]).sinh()
    most = float(rows.max())
    norm = load("matplotlib.colors").LogNorm(min(_single(spectra[0]) / 3, most / 10), most)
    rows = rows.clamp_min(norm.vmin)
    mesh = ax.pcolormesh(cells, sides, rows, norm=norm, cmap="viridis", shading="flat", rasterized=True)
    resolved = [(step, spectrum.outliers) for step, spectrum in history if spectrum.outliers is not None]
    dots = [(value, step) for step, outliers in resolved for value in outliers.tolist()]
    if dots:
        values, places = zip(*dots)
        ax.scatter(values, places, s=3, color=RED, linewidths=0)
    figure: Any = ax.get_figure()
    figure.colorbar(mesh, ax=ax, pad=0.02).set_label("density")
    _axis(ax, unit * points.sinh(), unit)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("optimizer step")


def axis_unit(spectra: Sequence[Spectrum]) -> float:
    """Return the unit of an axis that shows all these densities, see `draw_density`."""
    return LINEAR * max(float(spectrum.nodes.abs().max()) for spectrum in spectra) or 1.0


def _single(spectrum: Spectrum) -> float:
    """Return the height of a single eigenvalue."""
    return 1 / (spectrum.size * WIDTH * math.sqrt(2 * math.pi))


def _points(spectra: Sequence[Spectrum], unit: float) -> Tensor:
    """Return a grid, even on the axis, that reaches beyond all nodes."""
    low = min(float(spectrum.nodes[0]) for spectrum in spectra)
    high = max(float(spectrum.nodes[-1]) for spectrum in spectra)
    beyond = 5 * WIDTH
    return torch.linspace(
        math.asinh(low / unit) - beyond, math.asinh(high / unit) + beyond, POINTS, dtype=torch.float64
    )


def _heights(spectrum: Spectrum, points: Tensor, unit: float) -> Tensor:
    return smoothed_density((spectrum.nodes / unit).asinh(), spectrum.weights, points, WIDTH)


def _axis(ax: Axes, places: Tensor, unit: float) -> None:
    """Put ticks at powers of ten on both sides of 0."""
    ax.set_xscale("asinh", linear_width=unit)
    low, high = float(places[0]), float(places[-1])
    powers = range(math.ceil(math.log10(unit) + 0.3), math.ceil(math.log10(max(-low, high))) + 1)
    ticks = [*(-(10.0**k) for k in reversed(powers)), 0.0, *(10.0**k for k in powers)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    ax.grid(False)
