"""Log figures with the loggers that take them."""

from __future__ import annotations

from typing import Any


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
