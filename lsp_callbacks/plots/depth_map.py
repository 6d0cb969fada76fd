"""Drawing of a network's sensitivities over depth and training time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lsp_callbacks.plots.figure import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Largest number of layers that are named beside the picture.
NAMED = 24


def draw_depth_map(sigma: Tensor, steps: Sequence[int], layers: Sequence[str], ax: Axes) -> None:
    """Draw ``log10 sigma^x_k`` as colours: red expands, blue contracts, white keeps the size of a perturbation.

    Args:
        sigma: ``(measurements, L)``; cells that are 0 or not finite stay empty.
        steps: of the measurements, ascending.
        layers: names of the layers, from the input on.
        ax: to draw into.

    Raises:
        ImportError: without matplotlib.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.ma.masked_invalid(np.log10(sigma.numpy().T))
    top = max(float(np.abs(logs).max()) if logs.count() else 0.0, 0.1)
    norm = load("matplotlib.colors").Normalize(-top, top)
    x, y = edges(np.asarray(steps, dtype=float)), np.arange(len(layers) + 1) + 0.5
    mesh = ax.pcolormesh(x, y, logs, cmap="RdBu_r", norm=norm, shading="flat", rasterized=True)
    figure: Any = ax.get_figure()
    bar = figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label(r"$\log_{10} \Vert \partial X_k / \partial X_0 \Vert$ (above 0: amplifies)")
    bar.outline.set_linewidth(0.5)
    stride = -(-len(layers) // NAMED)
    ax.set_yticks(range(1, len(layers) + 1, stride), layers[::stride], fontsize=7)
    ax.set_ylim(len(layers) + 0.5, 0.5)  # the input is at the top
    ax.grid(False)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("depth")


def edges(steps: np.ndarray) -> np.ndarray:
    """Return the edges of cells around ascending steps, half way between them."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
