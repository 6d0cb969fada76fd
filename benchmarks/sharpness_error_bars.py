"""Claim: followed by two products a reading, or a few more, sharpness is within 3 % in the median.

Found: the tables of the ``.md``, against scipy's eigsh in float64, along ten runs of a hundred readings each. With
``bounded`` all lie inside, at three times the products. The constants of
`lsp_callbacks.operators.curvature.followed_top` were chosen on seeds 0 and 1. Tables of bounds are older than
differences at kinks whose slopes are held.

``python benchmarks/sharpness_error_bars.py [SEED [READINGS [EVERY]]] [--bounded] [--only WORD]`` prints such a table;
EVERY is the number of steps between readings, otherwise as in `sharpness_runs.RUNS`; WORD is a part of their names.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np
import torch
from sharpness_runs import RUNS, exact_top, readings

from lsp_callbacks import Sharpness
from lsp_callbacks.operators.curvature.stability_threshold import threshold_constant
from lsp_callbacks.operators.trajectory import frozen_preconditioner as frozen
from lsp_callbacks.operators.trajectory.coming_preconditioner import coming_rule
from lsp_callbacks.quantities.curvature.sharpness import measured_threshold

HEAD = "| run | error, median | 95 % of readings | most | bar, median | products | outside | by more than twice |"


def errors(
    name: str, seed: int, count: int = 100, every: int | None = None, *, bounded: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Of sharpness and of ``courant_gd``: ``(truth / value - 1, bar, products)`` of each reading."""
    metric, rows, courant = Sharpness(bounded=bounded), [], []
    run = RUNS[name] if every is None else replace(RUNS[name], every=every)
    for snapshot, loss_of in readings(run, seed, count):
        state = torch.random.get_rng_state()
        metric.update(snapshot)
        values = {key.split("/")[1]: float(value) for key, value in metric.compute().items()}
        edge = measured_threshold(snapshot, None, None, metric.method, bounded=bounded)
        (truth,) = exact_top(snapshot.module, loss_of)
        rows.append((truth / values["sharpness"] - 1, values["sharpness_residual"], edge.products))
        rule = coming_rule(snapshot)
        rate = frozen.rates(snapshot, rule)
        if isinstance(rate, torch.Tensor):  # behind a preconditioner the Courant number has a run of its own
            (top,) = exact_top(snapshot.module, loss_of, rate**0.5)
            truth = top / threshold_constant(rule)
            courant.append((truth / values["courant_gd"] - 1, values["courant_gd_residual"], 0))
        torch.random.set_rng_state(state)
    return np.array(rows), np.array(courant)


def row(name: str, found: np.ndarray) -> str:
    error, bar, products = found.T
    low = np.abs(1 - 1 / (1 + error))
    outside = np.maximum(error - bar, -error - bar) > 0
    twice = np.abs(error) > 2 * bar
    spent = f"{products[1:].mean():.1f}" if products.any() else ""
    return (
        f"| {name} | {np.median(low):.1%} | {np.quantile(low, 0.95):.1%} | {low.max():.1%} | {np.median(bar):.1%} "
        f"| {spent} | {outside.sum()} of {len(low)} | {twice.sum()} |"
    )


def table(seed: int, count: int = 100, every: int | None = None, *, bounded: bool = False, only: str = "") -> list[str]:
    lines, everything = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"], []
    for name in (name for name in RUNS if only in name):
        found, courant = errors(name, seed, count, every, bounded=bounded)
        everything.append(found)
        lines.append(row(name, found))
        print(lines[-1], file=sys.stderr, flush=True)
        if len(courant):
            lines.append(row(f"{name}: courant_gd", courant))
    return [*lines, row(f"all {only}".strip() + ", sharpness", np.concatenate(everything))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="*", type=int, default=[1], help="SEED, READINGS and EVERY")
    parser.add_argument("--bounded", action="store_true")
    parser.add_argument("--only", default="", help="a part of the names of the runs")
    how = parser.parse_args()
    print("\n".join(table(*how.numbers, bounded=how.bounded, only=how.only)))
