"""Which kind of logs a path holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lsp_callbacks.report.logs.csv_logs import read_csv
from lsp_callbacks.report.logs.logged_run import LoggedRun, UnreadableLogs
from lsp_callbacks.report.logs.mlflow_database import read_mlflow_database, split_run
from lsp_callbacks.report.logs.mlflow_logs import read_mlflow
from lsp_callbacks.report.logs.tensorboard_logs import read_tensorboard
from lsp_callbacks.report.logs.wandb_logs import read_wandb

EVENTS, WANDB = "events.out.tfevents*", "*.wandb"
#: Runs that a message names.
NAMED = 6


def read_run(path: Path) -> LoggedRun:
    """Return the run whose logs are at a path.

    Args:
        path: of a log file, of a run's folder, of a folder that holds one run, or ``mlflow.db:RUN``. A folder with
            several kinds of logs is read by the first of CSV, TensorBoard, MLflow and W&B.

    Raises:
        UnreadableLogs: where there are no logs, or those of several runs.
    """
    file, run = split_run(path)
    if run is not None and file.is_file():
        return read_mlflow_database(file, run)
    if not path.exists():
        raise UnreadableLogs(f"{path} does not exist")
    if (reader := reader_of(path)) is not None:
        return reader()
    runs = [] if path.is_file() else sorted({f for f in path.rglob("*") if _is_run(f) and not f.is_symlink()})
    readers = [reader for folder in runs if (reader := reader_of(folder)) is not None]
    if not readers:
        raise UnreadableLogs(
            f"{path} holds no logs that can be read: give a folder with metrics.csv (Lightning's CSVLogger), event "
            "files of TensorBoard, a run of MLflow (its folder, or mlflow.db), or an offline run of W&B"
        )
    if len(readers) > 1:
        names = ", ".join(str(folder) for folder in runs[:NAMED])
        more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
        raise UnreadableLogs(f"{path} holds {len(runs)} runs: give those that you want to see, of {names}{more}")
    return readers[0]()


def _is_run(path: Path) -> bool:
    return path.is_dir() and reader_of(path) is not None


def reader_of(path: Path) -> Callable[[], LoggedRun] | None:
    """Return what reads the logs that lie at a path itself, not further below; None without logs."""
    if path.is_file():
        if path.suffix == ".csv":
            return lambda: read_csv(path)
        if path.match(EVENTS):
            return lambda: read_tensorboard(path)
        if path.suffix == ".db":
            return lambda: read_mlflow_database(path)
        return (lambda: read_wandb(path)) if path.suffix == ".wandb" else None
    if (path / "metrics.csv").is_file():
        return lambda: read_csv(path / "metrics.csv")
    if any(path.glob(EVENTS)):
        return lambda: read_tensorboard(path)
    if (path / "meta.yaml").is_file() and (path / "metrics").is_dir():
        return lambda: read_mlflow(path)
    record = next(path.glob(WANDB), None)
    return None if record is None else lambda: read_wandb(record)
