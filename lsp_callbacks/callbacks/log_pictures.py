"""Log figures and histograms with the loggers that take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lsp_callbacks.quantities.key import is_global


def by_kind(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Return the finite numbers of single layers by the beginning that their keys share."""
    kinds: dict[str, list[float]] = {}
    for key, value in values.items():
        if not is_global(key) and math.isfinite(value):
            kinds.setdefault("/".join(key.split("/")[:2]), []).append(value)
    return kinds


def log_histogram(logger: Any, key: str, values: Sequence[float], step: int) -> bool:
    """Log numbers as a histogram if the logger can: its package need not be installed.

    Args:
        logger: Lightning's. TensorBoard, W&B and Comet take histograms; others are skipped.
        key: ``"stability/spectral_norm"``.
        values: finite numbers, at least one.
        step: of the row that they belong to.

    Returns:
        Whether the logger took it.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):  # W&B
        import wandb

        logger.log_metrics({key: wandb.Histogram(list(values))}, step=step)
    elif hasattr(experiment, "add_histogram"):
        experiment.add_histogram(key, np.asarray(values, dtype=float), step)
    elif hasattr(experiment, "log_histogram_3d"):
        experiment.log_histogram_3d(list(values), name=key, step=step)
    else:
        return False
    return True


def log_figure(logger: Any, key: str, figure: Any, step: int) -> bool:
    """Log a matplotlib figure if the logger can: its package need not be installed.

    Args:
        logger: Lightning's. TensorBoard, W&B, MLflow and Comet take figures; others are skipped.
        key: ``"stability/diagram"``; neither the key of a value nor a prefix of one.
        figure: to log.
        step: of the row that it belongs to; MLflow's artifacts have none.

    Returns:
        Whether the logger took it.
    """
    if hasattr(logger, "log_image"):  # W&B, which makes images of figures
        logger.log_image(key, [figure], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(key, figure, step, close=False)  # closing is for pyplot's
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):
        experiment.log_figure(logger.run_id, figure, f"{key}.png")
    elif hasattr(experiment, "log_figure") and hasattr(experiment, "get_key"):  # Comet's, which has another signature
        experiment.log_figure(figure_name=key, figure=figure, step=step)
    else:
        return False
    return True
