"""Where the files of a run belong, so that no run replaces those of another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any


def run_folder(trainer: Any) -> Path:
    """Return the folder of a run, where Lightning's ``ModelCheckpoint`` puts its checkpoints, too.

    With a logger that has a folder for each version (TensorBoard, CSV) it is that; with others (W&B, MLflow, Comet)
    ``save_dir/name/version``; without a logger ``default_root_dir``. To be called on all processes; the answer is that
    of rank zero there.
    """
    folder = trainer.log_dir or trainer.default_root_dir  # asked on all ranks: it is broadcast
    logger = trainer.loggers[0] if trainer.loggers and trainer.is_global_zero else None
    if logger is not None and folder != getattr(logger, "log_dir", None) and logger.version is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(folder) / str(logger.name) / version
    return Path(folder).absolute()


def unused(path: Path) -> Path:
    """Return a path at which nothing is: ``name.png``, or the first of ``name-v1.png``, ``name-v2.png``, ..."""
    others = (path.with_stem(f"{path.stem}-v{i}") for i in itertools.count(1))
    return next(each for each in itertools.chain([path], others) if not each.exists())
