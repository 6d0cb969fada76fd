"""Logs of MLflow in a folder: one text file for each metric and each parameter."""

from __future__ import annotations

from pathlib import Path

from lsp_callbacks.report.logs.logged_run import LoggedRun, curves_of, pictures_beside
from lsp_callbacks.report.logs.settings import HIDDEN, SECRET

#: Status of a run in ``meta.yaml``, by number or by name, that says that it goes on.
RUNNING = {"1", "RUNNING", "2", "SCHEDULED"}


def read_mlflow(folder: Path) -> LoggedRun:
    """Return the run of a folder of MLflow's file store, ``mlruns/<experiment>/<run>``."""
    points: dict[str, list[tuple[int, float]]] = {}
    unread = 0
    for path in sorted(file for file in (folder / "metrics").rglob("*") if file.is_file()):
        key = path.relative_to(folder / "metrics").as_posix()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                _, value, step = line.split(" ")[:3]
                points.setdefault(key, []).append((int(step), float(value)))
            except ValueError:
                unread += 1
    points.pop("epoch", None)
    parameters = {}
    for path in sorted(file for file in (folder / "params").rglob("*") if file.is_file()):
        name = path.relative_to(folder / "params").as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")[:10_000]
        parameters[name] = HIDDEN if SECRET.search(name) else text
    lines = (folder / "meta.yaml").read_text(encoding="utf-8", errors="replace").splitlines()
    status = next((line.partition(":")[2].strip() for line in lines if line.startswith("status:")), None)
    pictures, left_out = pictures_beside(folder / "artifacts", "**/stability*.png")
    others, larger = pictures_beside(folder / "artifacts", "stability/*.png")
    notes = (f"{unread} lines that are no numbers were left out",) if unread else ()
    return LoggedRun(
        folder,
        "MLflow",
        curves_of(points),
        {"params": parameters} if parameters else {},
        pictures=pictures | others,
        notes=(*notes, *left_out, *larger),
        ended=None if status is None else status not in RUNNING,
    )
