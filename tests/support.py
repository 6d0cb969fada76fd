"""What the contract suite has measured, for the support matrix of the documentation."""

import json
import math
from pathlib import Path

from lsp_callbacks.quantities import PRESETS

QUANTITIES = PRESETS["full"]


def results(callback, failed):
    """What became of each quantity in a run.

    Args:
        callback: the `StabilityMonitor` after the run.
        failed: the reason, by quantity, of what is expected to be NaN.
    """
    found, skipped = {}, callback.skipped
    for name, quantity in callback.monitor.quantities.items():
        keys = [key for key in quantity.keys if key in callback.history and not is_open_below(key)]
        values = [v for key in keys for v in callback.history[key].values]
        lost = [key.removeprefix("stability/") for key in quantity.keys]
        if values and all(map(math.isfinite, values)) and any(key in skipped and key != name for key in lost):
            found[name] = {"state": "partly", "reason": next(skipped[key] for key in lost if key in skipped)}
            continue
        if values and all(map(math.isfinite, values)):
            found[name] = {"state": "measured"}
        elif values:
            found[name] = {"state": "nan", "reason": failed[name]}
    return found | {
        name: {"state": "left out", "reason": reason} for name, reason in skipped.items() if name in QUANTITIES
    }


def is_open_below(key):
    """Whether a value of -inf says something: of a step that may remove the mode, the exponent has no lower bound."""
    return key == "stability/lyapunov_lower"


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
