"""Logs of MLflow in a data base of SQLite, which is opened to be read only."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path

from lsp_callbacks.report.logs.logged_run import LoggedRun, UnreadableLogs, curves_of
from lsp_callbacks.report.logs.mlflow_logs import RUNNING
from lsp_callbacks.report.logs.settings import HIDDEN, SECRET

#: The data base knows no infinity: what is as large was one.
LARGEST = 1.79e308
#: Runs that a message names.
NAMED = 6


def split_run(path: Path) -> tuple[Path, str | None]:
    """Return the file and the run of ``mlflow.db:RUN``; None where no run is named.

    Example:
        >>> split_run(Path("logs/mlflow.db:0123"))[1], split_run(Path("logs/mlflow.db"))[1]
        ('0123', None)
    """
    file, colon, run = str(path).rpartition(":")
    return (Path(file), run) if colon and file.endswith(".db") else (path, None)


def read_mlflow_database(path: Path, run: str | None = None) -> LoggedRun:
    """Return a run of ``mlflow.db``.

    Args:
        path: of the file.
        run: id of the run, or how it begins; None where there is one only.

    Raises:
        UnreadableLogs: for another data base, or if ``run`` does not name one run.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            return _read(path, connection, run)
    except sqlite3.Error as error:
        raise UnreadableLogs(f"{path} cannot be read as a data base of MLflow: {error}") from error


def _read(path: Path, connection: sqlite3.Connection, run: str | None) -> LoggedRun:
    listed = connection.execute("SELECT run_uuid, name, status FROM runs ORDER BY start_time").fetchall()
    chosen = [row for row in listed if str(row[0]).startswith(run or "")]
    if len(chosen) != 1:
        names = ", ".join(f"{path}:{row[0]} ({row[1]})" for row in (chosen or listed)[-NAMED:])
        what = f"holds {len(chosen)} runs" + (f" whose ids begin with {run!r}" if run else "")
        raise UnreadableLogs(f"{path} {what}: give one of {names or 'another file'}")
    ((name, _, status),) = chosen
    points: dict[str, list[tuple[int, float]]] = {}
    rows = connection.execute(
        "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp, step", (name,)
    )
    for key, step, value, is_nan in rows:
        points.setdefault(str(key), []).append((int(step), math.nan if is_nan else _value(float(value))))
    points.pop("epoch", None)
    parameters = {
        str(key): HIDDEN if SECRET.search(str(key)) else str(value)
        for key, value in connection.execute("SELECT key, value FROM params WHERE run_uuid = ?", (name,))
    }
    settings = {"params": parameters} if parameters else {}
    ended = None if status is None else str(status) not in RUNNING
    return LoggedRun(Path(f"{path}:{name}"), "MLflow", curves_of(points), settings, ended=ended)


def _value(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= LARGEST else value
