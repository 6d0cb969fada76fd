"""Claim: with `CapLearningRate`, ramps and jumps that fail end as healthy runs do.

What it costs healthy runs, and how it stands in for a warm-up, is printed, too; neither is claimed.

*Failing*: ramps and jumps of ``benchmarks/runs.py`` with the cap (without it they fail: ``two_populations.md``), beside
the same problem at a constant rate that trains well (that before the jump; five times that at the foot of a ramp).
*Healthy*: without and with the cap, and how far apart the seeds are. *Warm-up*: a constant rate, three times the
largest that trains (in steps of two), with the cap, beside the best of six warm-ups to rates at and below that. Printed
are the mean of the last 50 losses, also as a share of the first loss, the accuracy over all samples at the end, and the
share of capped updates.

``MNIST=<folder> python benchmarks/cap_learning_rate.py failing healthy warm-up`` prints the tables, of which a
part is in ``cap_learning_rate.md``; ``seeds=0,1`` chooses seeds, other words are beginnings of names of runs.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from runs import DATA, PROBLEMS, Problem, R, constant, fit, jump, ramp, short, words

from lsp_callbacks import CapLearningRate, StabilityMonitor

SEEDS = (0, 1)
HEALTHY = (
    "constant, SGD, ReLU MLP", "constant, momentum, ReLU MLP", "constant, momentum, 3 x higher, tanh MLP",
    "constant, AdamW, ReLU MLP", "cosine, momentum, ReLU MLP", "warm restarts, momentum, ReLU MLP",
    "full-batch GD at the edge, tanh MLP, squared loss", "constant, SGD 0.3, tanh MLP, digits",
    "constant, RMS-like AdamW 0.01, tanh MLP", "warm-up, AdamW 0.03, ReLU MLP",
    "constant, SGD, BatchNorm CNN", "one cycle, AdamW, transformer",
)  # fmt: skip
#: At the rate 1, which the search replaces.
WARMED = {
    "MLP, momentum": short("mlp", R, 1.0, 0.9),
    "CNN, momentum": short("cnn", R, 1.0, 0.9),
    "transformer, AdamW": words(1.0, steps=400),
}


class Accuracy(pl.Callback):
    """The share of samples (of positions, of texts) that are predicted right at the end."""

    value = math.nan

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        x, y = DATA[pl_module.problem.data]().tensors
        pl_module.net.eval()
        with torch.no_grad():
            outputs = torch.cat([pl_module.net(part) for part in x.split(500)])
        self.value = float((outputs.argmax(-1) == y).double().mean())


@dataclass(frozen=True)
class End:
    """How a run ends: the mean of the last 50 losses, that over the first loss, accuracy, share of capped updates."""

    loss: float
    share: float
    accuracy: float
    capped: float

    def __str__(self) -> str:
        return f"{self.loss:.3g} | {100 * self.share:.3g} % | {100 * self.accuracy:.1f} %"


def run(problem: Problem, seed: int, *, capped: bool) -> End:
    """Train once; with the cap everything is at its defaults."""
    accuracy, cap = Accuracy(), CapLearningRate(verbose=False)
    losses = fit(problem, seed, [accuracy, *([StabilityMonitor(), cap] if capped else [])])
    last = losses.values[-50:]
    mean = sum(last) / len(last)
    return End(mean, mean / losses.values[0], accuracy.value, cap.capped / len(losses.values))


def failing(names: Sequence[str], seeds: Sequence[int]) -> None:
    print("\n## Failing\n\n| run | seed | with the cap | first | accuracy | capped |", end="")
    print(" healthy, worst of the seeds | first | accuracy | as healthy |\n" + "|---" * 10 + "|")
    for name in names:
        problem = PROBLEMS[name]
        well = replace(problem, schedule=constant, lr=problem.lr * (5 if problem.schedule is ramp else 1))
        healthy = [run(well, seed, capped=False) for seed in seeds]
        worst = max(healthy, key=lambda end: end.loss)
        least = min(end.accuracy for end in healthy)
        for seed in seeds:
            end = run(problem, seed, capped=True)
            same = end.share <= 0.25 and (end.loss <= worst.loss or end.accuracy >= least - 0.01)
            print(
                f"| {name} | {seed} | {end} | {100 * end.capped:.0f} % | {worst} | {'yes' if same else 'no'} |",
                flush=True,
            )


def healthy(names: Sequence[str], seeds: Sequence[int]) -> None:
    print(
        "\n## Healthy\n\n| run | seed | without | first | accuracy | with the cap | first | accuracy | capped |", end=""
    )
    print(" spread of the seeds' losses | within |\n" + "|---" * 11 + "|")
    for name in names:
        without = [run(PROBLEMS[name], seed, capped=False) for seed in seeds]
        spread = max(end.loss for end in without) - min(end.loss for end in without)
        for seed, end in zip(seeds, without):
            with_cap = run(PROBLEMS[name], seed, capped=True)
            same = with_cap.loss - end.loss <= spread
            print(
                f"| {name} | {seed} | {end} | {with_cap} | {100 * with_cap.capped:.0f} % | {spread:.2g} |"
                f" {'yes' if same else 'no'} |",
                flush=True,
            )


def warm_up_to(share: float) -> Callable[[float], float]:
    return lambda at: min(1.0, (at + 1e-3) / share)


def warm_ups(names: Sequence[str], seeds: Sequence[int]) -> None:
    print(
        "\n## Warm-up\n\n| run | seed | rate | without | first | accuracy | with the cap | first | accuracy |", end=""
    )
    print(" capped | best warm-up | its end | first | accuracy |\n" + "|---" * 14 + "|")
    for name in names:
        problem, first = WARMED[name], 2.0 ** (-3 if "AdamW" not in name else -7)
        rates = [first * 2.0**k for k in range(7)]
        ends = {rate: run(replace(problem, lr=rate), seeds[0], capped=False) for rate in rates}
        largest = max(rate for rate, end in ends.items() if end.share <= 0.25)
        tried = {
            (rate, share): run(replace(problem, lr=rate, schedule=warm_up_to(share)), seeds[0], capped=False)
            for rate in (largest, largest / 2, largest / 4)
            for share in (0.05, 0.2)
        }
        rate, share = min(tried, key=lambda key: tried[key].loss)
        for seed in seeds:
            too_high = replace(problem, lr=3 * largest)
            without, with_cap = (run(too_high, seed, capped=capped) for capped in (False, True))
            warm = run(replace(problem, lr=rate, schedule=warm_up_to(share)), seed, capped=False)
            print(
                f"| {name} | {seed} | {3 * largest:g} | {without} | {with_cap} | {100 * with_cap.capped:.0f} % |"
                f" to {rate:g} in {100 * share:g} % | {warm} |",
                flush=True,
            )


def main(words: Sequence[str]) -> None:
    """Print the tables that are asked for."""
    seeds = next((tuple(map(int, w[6:].split(","))) for w in words if w.startswith("seeds=")), SEEDS)
    tables = [w for w in words if w in ("failing", "healthy", "warm-up")]
    starts = tuple(w for w in words if w not in tables and not w.startswith("seeds=")) or ("",)
    if "failing" in tables:
        failing([n for n, p in PROBLEMS.items() if p.schedule in (ramp, jump) and n.startswith(starts)], seeds)
    if "healthy" in tables:
        healthy([n for n in HEALTHY if n.startswith(starts)], seeds)
    if "warm-up" in tables:
        warm_ups([n for n in WARMED if n.startswith(starts)], seeds)


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
