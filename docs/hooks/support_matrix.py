"""Turn what the contract suite has measured into the support matrix."""

from __future__ import annotations

import json
from pathlib import Path

TITLES = {
    "optimizer": "Optimizers",
    "model": "Models",
    "precision": "Precisions",
    "strategy": "Strategies",
}


def tables(path: Path) -> str:
    """Return the tables of the recorded results, one for each axis.

    Args:
        path: of the JSON file that ``pytest --support-matrix`` has written.
    """
    recorded = json.loads(path.read_text())
    parts = []
    for axis, title in TITLES.items():
        rows = {row["name"]: row for row in recorded["rows"] if row["axis"] == axis}
        parts.append(f"## {title}\n\n{table(rows, recorded['quantities'])}")
    return "\n".join(parts)


def table(rows: dict[str, dict], quantities: list[str]) -> str:
    """Return one table, cases by quantities, with its reasons."""
    reasons: dict[str, int] = {}
    lines = [
        "| | "
        + " | ".join(f"[{_breakable(name)}](reference/quantities.md#{name})" for name in quantities)
        + " | path |",
        "|---|" + ":-:|" * len(quantities) + "---|",
    ]
    for name, row in rows.items():
        cells = [_cell(row["results"].get(quantity), reasons) for quantity in quantities]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + f" | {row.get('path', '')} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes, ""])


def _cell(result: dict[str, str] | None, reasons: dict[str, int]) -> str:
    if result is None:
        return ""
    if result["state"] == "measured":
        return "●"
    reason = result["reason"]
    number = reasons.setdefault(reason, len(reasons) + 1)
    return {"left out": "○", "partly": "◐"}.get(result["state"], "✗") + f" {number}"


def _breakable(name: str) -> str:
    return name.replace("_", "_<wbr>")
