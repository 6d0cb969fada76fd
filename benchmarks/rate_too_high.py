"""Claim: one Courant number of 5, and a loss that does not fall, tell a rate that is far too high from a healthy one.

Two populations at the default cadence. *Too high*: the rate is far beyond the edge from the first step on. *Healthy*:
the constant, warmed-up and scheduled runs of ``runs.py``, and some that come back from an explosion.
``StopOnInstability`` watches, and lets training go on. For each run: the largest single Courant number among those
every 25 steps of a second run, what the loss did, and where the stop would have been.
``python benchmarks/rate_too_high.py`` prints the table of ``rate_too_high.md``.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from runs import PROBLEMS, Problem, fit

from lsp_callbacks import StabilityMonitor, StopOnInstability

STEPS, EVERY = 400, 25
T, R = torch.nn.Tanh, torch.nn.ReLU
TOO_HIGH = {
    "SGD, tanh MLP, lr 3": Problem("mlp", T, 3.0, batch=64, data="digits"),
    "SGD, tanh MLP, lr 10": Problem("mlp", T, 10.0, batch=64, data="digits"),
    "SGD, ReLU MLP, lr 10": Problem("mlp", R, 10.0, batch=64, data="digits"),
    "SGD, tanh MLP, squared loss, lr 10": Problem("mlp", T, 10.0, batch=64, squared=True, data="digits"),
    "momentum, tanh MLP, lr 3": Problem("mlp", T, 3.0, 0.9, batch=64, data="digits"),
    "momentum, ReLU MLP, lr 10": Problem("mlp", R, 10.0, 0.9, batch=64, data="digits"),
    "SGD, ReLU MLP, MNIST, lr 10": Problem("mlp", R, 10.0),
    "SGD, ReLU CNN, MNIST, lr 10": Problem("cnn", R, 10.0),
}
COME_BACK = {
    "SGD, tanh MLP, lr 1": Problem("mlp", T, 1.0, batch=64, data="digits"),
    "SGD, ReLU MLP, lr 0.5": Problem("mlp", R, 0.5, batch=64, data="digits"),
    "AdamW, ReLU MLP, lr 0.03": Problem("mlp", R, 0.03, None, batch=64, data="digits"),
}


class Watch(StopOnInstability):
    """Notes when it would have stopped, and lets training go on."""

    def judge(self, *args: Any) -> bool:
        super().judge(*args)
        return False


def run(problem: Problem, seed: int) -> dict[str, Any]:
    """Trains twice: at the default cadence, and measured every 25 steps."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    for name, settings in (("default", {}), ("often", {"every_n_steps": EVERY})):
        monitor, watch = StabilityMonitor(["sharpness", "sgd_stability"], **settings), Watch(verbose=False)
        losses = fit(replace(problem, steps=STEPS), seed, [monitor, watch]).values
        readings = monitor.history["stability/courant"].values
        found[name] = (watch.event_step, watch.stop_step, monitor.verdict.state)
        found["first"] = readings[0]
        found["largest"] = max(readings, default=float("nan"))
        found["losses"] = losses
    return found


def row(kind: str, name: str, problem: Problem, seeds: list[int]) -> str:
    runs = [run(problem, seed) for seed in seeds]
    cells = [
        ", ".join(f"{r['first']:.2g}" for r in runs),
        ", ".join(f"{r['largest']:.2g}" for r in runs),
        ", ".join(f"{r['losses'][0]:.2g} to {sum(r['losses'][-50:]) / 50:.2g}" for r in runs),
        *(
            ", ".join("-" if r[cadence][1] is None else str(r[cadence][1]) for r in runs)
            for cadence in ("default", "often")
        ),
        ", ".join(r["default"][2] for r in runs),
    ]
    return f"| {kind} | {name} | {' | '.join(cells)} |"


def main(seeds: list[int]) -> None:
    head = ("kind", "run", "first Courant number", "largest", "loss", "stop", f"stop, every {EVERY} steps", "verdict")
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    healthy = COME_BACK | {name: problem for name, problem in PROBLEMS.items() if not problem.fails}
    for kind, problems in (("too high", TOO_HIGH), ("healthy", healthy)):
        for name, problem in problems.items():
            print(row(kind, name, problem, seeds), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([int(seed) for seed in sys.argv[1:]] or [0])
