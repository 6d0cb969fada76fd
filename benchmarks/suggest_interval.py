"""Claim: the interval of ``lsp-callbacks suggest`` holds the largest stable learning rate on most of 20 small problems.

Four networks on scikit-learn's digits and a perceptron on its diabetes data, under SGD, momentum and AdamW. Each end of
the interval is trained at three times from the initial weights, on batches of its own, for as many steps as ``suggest``
takes. A run is beyond the edge if the mean Courant number of its later half is above 1, if it has failed, or if it has
fallen behind the runs at the lower end by a tenth of what these have learned. The interval holds the edge
if most runs at its lower end are within it, and most at its upper end beyond. Printed are the Courant numbers at both
ends (``behind`` or ``failed`` where that counts), and how many intervals hold the edge.

``python benchmarks/suggest_interval.py seeds=40`` prints the table of ``suggest_interval.md``; other words are
beginnings of names.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from runs import DATA, R, T, short
from suggest_against_lr_find import Task, begin, diabetes, perceptron, trainer

from lsp_callbacks import StabilityMonitor, Unmeasurable
from lsp_callbacks.cli.configured import fit_until_done
from lsp_callbacks.cli.rate_search import BEHIND, RateSearch, TrialRun
from lsp_callbacks.cli.suggest import STEPS, suggest
from lsp_callbacks.cli.trial_runs import TrialRuns

REPEATS = 3
RULES = {"SGD": 0.0, "momentum": 0.9, "AdamW": None}
TASKS = (
    {
        f"{name}, {rule}": Task(short(net, act, 0.0, beta, batch=32), DATA["digits"])
        for name, net, act in (
            ("tanh MLP", "mlp", T),
            ("ReLU MLP", "mlp", R),
            ("CNN", "cnn", R),
            ("BN MLP", "bn mlp", R),
        )
        for rule, beta in RULES.items()
    }
    | {
        f"regression, {name}, {rule}": Task(short("mlp", act, 0.0, beta, batch=32), diabetes, perceptron)
        for name, act in (("tanh", T), ("ReLU", R))
        for rule, beta in RULES.items()
    }
    | {
        f"batch 8, MLP, {rule}": Task(short("mlp", T, 0.0, RULES[rule], batch=8), DATA["digits"])
        for rule in ("SGD", "AdamW")
    }
)


class GivenRates(RateSearch):
    """Runs at rates that are given."""

    def __init__(self, first: float, rates: Sequence[float]):
        super().__init__(first)
        self.rates = rates

    is_candidate = False

    def next_rate(self) -> float | None:
        return self.rates[len(self.runs)] if len(self.runs) < len(self.rates) else None


class AtRates(TrialRuns):
    """`TrialRuns` at rates that are given."""

    def __init__(self, rates: Sequence[float]):
        super().__init__(STEPS, partial(StabilityMonitor, seed=1))
        self.rates = rates

    def _begin_search(self) -> None:
        super()._begin_search()
        if self.search is not None:
            self.search = GivenRates(self.search.first, self.rates)


def train_at(task: Task, seed: int, rates: Sequence[float]) -> list[TrialRun]:
    """Train from the initial weights of a seed at each of these rates, on other batches than `suggest` had."""
    module, loader = begin(task, seed)
    runs = AtRates(rates)
    torch.manual_seed(1000 + seed)
    fit_until_done(trainer(STEPS), module, runs, ckpt_path=None, train_dataloaders=loader)
    assert runs.search is not None
    return runs.search.runs


def beyond(run: TrialRun, low: Sequence[TrialRun]) -> str:
    """Return why a run is beyond the edge; empty if it is not."""
    if run.failure:
        return "failed"
    settled = [other for other in low if not other.failure]
    if run.courant > 1 or math.isnan(run.courant):
        return "above 1"
    learned = sum(other.start - other.end for other in settled) / max(len(settled), 1)
    end = sum(other.end for other in settled) / max(len(settled), 1)
    return "behind" if settled and run.rate > settled[0].rate and run.end - end > BEHIND * learned > 0 else ""


def main(words: Sequence[str]) -> None:
    """Print the table."""
    seeds = next((tuple(map(int, w[6:].split(","))) for w in words if w.startswith("seeds=")), (40,))
    starts = tuple(w for w in words if not w.startswith("seeds=")) or ("",)
    print(
        "| problem | seed | rate | interval | runs | at the lower end | at the upper end | holds |\n" + "|---" * 8 + "|"
    )
    held, widths = [], []
    for name, task in TASKS.items():
        for seed in seeds if name.startswith(starts) else ():
            module, loader = begin(task, seed)
            try:
                found = suggest(trainer(STEPS), module, train_dataloaders=loader)
            except Unmeasurable as error:
                print(f"| {name} | {seed} | refused: {error} | | | | | |", flush=True)
                continue
            rate = found.rate
            runs = train_at(task, seed, [rate.low] * REPEATS + [rate.high] * REPEATS)
            low, high = runs[:REPEATS], runs[REPEATS:]
            ends = [[beyond(run, low) for run in end] for end in (low, high)]
            holds = 2 * sum(map(bool, ends[0])) < REPEATS < 2 * sum(map(bool, ends[1]))
            held.append(holds)
            widths.append(rate.high / rate.low)
            said = [
                ", ".join(why if why in ("failed", "behind") else f"{run.courant:.2f}" for run, why in zip(end, whys))
                for end, whys in zip((low, high), ends)
            ]
            print(
                f"| {name} | {seed} | {rate.value:.3g} | {rate.low:.3g} to {rate.high:.3g} | {len(found.runs)} |"
                f" {said[0]} | {said[1]} | {'yes' if holds else 'no'} |",
                flush=True,
            )
    if held:
        middle = sorted(widths)[len(widths) // 2]
        print(
            f"\n{sum(held)} of {len(held)} intervals hold the edge; their ends are apart by {middle:.2f} in the median"
        )


if __name__ == "__main__":
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.callbacks.model_summary").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
