"""Curves as a table with a row for each step: a data frame, or a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

#: Steps and values of a key.
Points = tuple[Sequence[int], Sequence[float]]
STEP = "step"


def data_frame(curves: Mapping[str, Points]) -> pandas.DataFrame:
    """Return a data frame with a column for each key, NaN where nothing was measured.

    Raises:
        ImportError: without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_frame() needs pandas, which is not installed: pip install pandas") from error
    steps = _steps(curves)
    rows = {step: row for row, step in enumerate(steps)}
    cells = np.full((len(steps), len(curves)), np.nan)
    for column, (measured, values) in enumerate(curves.values()):
        cells[[rows[step] for step in measured], column] = values
    return pandas.DataFrame(cells, index=pandas.Index(steps, name=STEP, dtype=int), columns=list(curves))


def write_table(path: str | Path, curves: Mapping[str, Points]) -> None:
    """Write a CSV file with a column for each key: an empty cell was not measured, ``nan`` has failed.

    Raises:
        ValueError: where the path does not end in ``.csv``.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"path={str(path)!r}: give the name of a table, ending in .csv")
    columns = [dict(zip(steps, values)) for steps, values in curves.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([STEP, *curves])
        for step in _steps(curves):  # repr of a float is read back as the same number
            table.writerow([step, *(repr(float(column[step])) if step in column else "" for column in columns)])


def read_table(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the curves of a file that `write_table` has written.

    Raises:
        ValueError: for a file of another kind.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header[:1] != [STEP]:
        raise ValueError(f"{path} is no saved history: its first column is {header[:1]}, not 'step'")
    curves: dict[str, tuple[list[int], list[float]]] = {key: ([], []) for key in header[1:]}
    for row in rows:
        for (steps, values), cell in zip(curves.values(), row[1:]):
            if cell:
                steps.append(int(row[0]))
                values.append(float(cell))
    return curves


def _steps(curves: Mapping[str, Points]) -> list[int]:
    """Return all steps at which something was measured, ascending."""
    return sorted({step for steps, _ in curves.values() for step in steps})
