"""Logs of Lightning's CSVLogger: ``metrics.csv``, ``hparams.yaml`` and what lies beside them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lsp_callbacks.report.logs.logged_run import LoggedRun, UnreadableLogs, curves_of, pictures_beside
from lsp_callbacks.report.logs.settings import settings_beside

#: Columns that say where a row belongs.
PLACES = ("step", "epoch")


def read_csv(path: Path) -> LoggedRun:
    """Return the run of a ``metrics.csv``.

    A last line that is still being written is left out; a cell that is no number is counted, and said.

    Args:
        path: of the file.

    Raises:
        UnreadableLogs: without a column ``step``.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    # A quoted cell may hold line breaks; without a last one, the last row is not whole.
    whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
    try:
        header, *rows = list(csv.reader(io.StringIO(whole.replace("\0", ""), newline=""))) or [[]]
    except csv.Error as error:
        raise UnreadableLogs(f"{path} is no table: {error}") from error
    if "step" not in header:
        raise UnreadableLogs(f"{path} has no column 'step': give a metrics.csv of Lightning's CSVLogger")
    at = header.index("step")
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in header if name not in PLACES}
    columns = [(i, points[name].append) for i, name in enumerate(header) if name in points]
    words = back = 0
    before = -1
    for row in rows:
        try:
            step = int(float(row[at]))
        except (ValueError, IndexError, OverflowError):
            words += 1
            continue
        back, before = back + (step < before), step
        for i, append in columns:
            if i < len(row) and row[i]:
                try:
                    append((step, float(row[i])))
                except ValueError:
                    words += 1
    notes = []
    if words:
        notes.append(f"{words:,} cells or rows that are no numbers were left out")
    if back:
        notes.append(f"the steps go back {back:,} times (a resumed run?): of two values of one step the later counts")
    settings, texts = settings_beside(path.parent, ("hparams.yaml", "config.yaml"))
    pictures, left_out = pictures_beside(path.parent)
    return LoggedRun(path, "CSV", curves_of(points), settings, texts, pictures, (*notes, *left_out))
