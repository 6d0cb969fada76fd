"""What the contract suite has measured, for the support matrix of the documentation."""

import json
import math
from pathlib import Path

from lsp_callbacks.quantities import PRESETS

QUANTITIES = PRESETS["full"]


def is_told(key, value):
    """Whether a number is one: a step near ``eta lambda = 1`` removes the mode, and the bound from below is -inf."""
    return math.isfinite(value) or (key.endswith("_lower") and value == -math.inf)


def results(callback, failed):
    """What became of each quantity in a run.

    Args:
        callback: the `StabilityMonitor` after the run.
        failed: the reason, by quantity, of what is expected to be NaN.
    """
    found, skipped = {}, callback.skipped
    for name, quantity in callback.monitor.quantities.items():
        curves = [(key, callback.history[key].values) for key in quantity.keys if key in callback.history]
        are_told = [is_told(key, value) for key, values in curves for value in values]
        lost = [key.removeprefix("stability/") for key in quantity.keys]
        if are_told and all(are_told) and any(key in skipped and key != name for key in lost):
            found[name] = {"state": "partly", "reason": next(skipped[key] for key in lost if key in skipped)}
            continue
        if are_told and all(are_told):
            found[name] = {"state": "measured"}
        elif are_told:
            found[name] = {"state": "nan", "reason": failed[name]}
    return found | {
        name: {"state": "left out", "reason": reason} for name, reason in skipped.items() if name in QUANTITIES
    }


def path(callback):
    """By which way curvature and Gram matrix were found."""
    paths = callback.paths
    parts = [paths.get("sharpness", "")]
    if "sgd_stability" in paths:
        parts.append(f"Gram matrix by {paths['sgd_stability']}")
    return "; ".join(filter(None, parts))


class Matrix:
    """Collects the rows of all processes of a test run, and writes them; rows that were not recorded anew stay."""

    def __init__(self, file):
        self.file, self.rows = Path(file), []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.rows += [json.loads(row) for name, row in report.user_properties if name == "support"]

    def pytest_sessionfinish(self, session):
        kept = json.loads(self.file.read_text())["rows"] if self.file.exists() else []
        rows = {(row["axis"], row["name"]): row for row in (*kept, *self.rows)}
        ordered = sorted(rows.values(), key=lambda row: (row["axis"], row["order"]))
        self.file.write_text(json.dumps({"quantities": QUANTITIES, "rows": ordered}, indent=1) + "\n")
