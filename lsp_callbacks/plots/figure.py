"""What all drawings share: the style, the colours, and matplotlib where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

# Okabe & Ito's colours: safe for colour-blind readers.
BLUE, GREEN, ORANGE, RED, PURPLE, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#6b6b6b"
YELLOW, BLACK = "#F0E442", "#1a1a1a"
STYLE = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.edgecolor": "#4a4a4a",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8e8e8", "grid.linewidth": 0.6,
    "xtick.color": "#4a4a4a", "ytick.color": "#4a4a4a", "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "lines.solid_capstyle": "round",
}  # fmt: skip


def load(module: str) -> Any:
    """Return a module of matplotlib or rich, which need not be installed until something is shown.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"plots and reports need {module.split('.')[0]}, which is not installed: "
            "pip install 'lsp-callbacks[report]'"
        ) from error
