"""Claim: a sweep over rate and batch size takes fewer steps for the same best where `StabilityPruner` ends trials.

Scikit-learn's digits, a ReLU perceptron under SGD with momentum, 20 trials of Optuna's random sampler: learning rates
from 1e-3 to 10, batches of 16 to 128, 200 steps a trial, judged by the mean of the last 50 losses. The same trials
without a pruner, with `StabilityPruner`, with Optuna's `MedianPruner` and `HyperbandPruner` (which are told the mean
loss after every 20 steps), and with `StabilityPruner` beside `MedianPruner`. Printed are the steps of all trials, their
share of those without a pruner, the best loss, how many trials were ended, and whether the best trial survived.
Measuring costs `StabilityPruner` some per cent of a step beside that, see ``overhead.md``.

``python benchmarks/sweeps.py seeds=0,1`` prints the table of ``sweeps.md``. Optuna comes with ``pip install
'lsp-callbacks[sweeps]'``. The reporter for Ray Tune ends trials by the same rule, so its share is that of
`StabilityPruner`.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from runs import R, fit, short

from lsp_callbacks import StabilityMonitor, StabilityPruner

try:
    import optuna
except ImportError as error:
    raise SystemExit(f"sweeps.py needs Optuna ({error}): pip install 'lsp-callbacks[sweeps]'") from error

TRIALS, STEPS, LAST, REPORT = 20, 200, 50, 20
PRUNERS: dict[str, Any] = {
    "none": optuna.pruners.NopPruner,
    "StabilityPruner": optuna.pruners.NopPruner,
    "MedianPruner": optuna.pruners.MedianPruner,
    "Hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=REPORT, max_resource=STEPS),
    "StabilityPruner and MedianPruner": optuna.pruners.MedianPruner,
}


class Reports(pl.Callback):
    """Tells a trial its mean loss, and ends it where Optuna's own pruner says so."""

    def __init__(self, trial: Any, prunes: bool):
        self.trial, self.prunes, self.losses = trial, prunes, list[float]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.prunes and len(self.losses) % REPORT == 0:
            mean = sum(self.losses[-REPORT:]) / REPORT
            self.trial.report(mean if math.isfinite(mean) else 1e9, len(self.losses))
            if self.trial.should_prune():
                raise optuna.TrialPruned


def sweep(name: str, seed: int) -> tuple[int, float, int, tuple[float, int]]:
    """Return the steps of all trials, the best loss, how many trials were ended, and the best rate and batch."""
    taken, ended = 0, 0

    def objective(trial: Any) -> float:
        nonlocal taken, ended
        lr, batch = trial.suggest_float("lr", 1e-3, 10, log=True), trial.suggest_categorical("batch", [16, 32, 64, 128])
        reports = Reports(trial, "Median" in name or "Hyperband" in name)
        callbacks = [StabilityMonitor(), StabilityPruner(trial, verbose=False)] if "Stability" in name else []
        try:
            losses = fit(short("mlp", R, lr, 0.9, batch=batch, steps=STEPS), seed, [*callbacks, reports]).values
        except optuna.TrialPruned:
            ended += 1
            raise
        finally:
            taken += len(reports.losses)
        mean = sum(losses[-LAST:]) / LAST
        return mean if math.isfinite(mean) else 1e9

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed), pruner=PRUNERS[name]())
    study.optimize(objective, n_trials=TRIALS)
    best = study.best_trial
    return taken, best.value, ended, (best.params["lr"], best.params["batch"])


def main(words: Sequence[str]) -> None:
    """Print the table."""
    seeds = next((tuple(map(int, w[6:].split(","))) for w in words if w.startswith("seeds=")), (0,))
    print("| pruner | seed | steps | of those without | best loss | ended | the same best |\n" + "|---" * 7 + "|")
    shares: dict[str, list[float]] = {name: [] for name in PRUNERS}
    for seed in seeds:
        whole, best = 0, (0.0, 0)
        for name in PRUNERS:
            steps, loss, ended, chosen = sweep(name, seed)
            if name == "none":
                whole, best = steps, chosen
            shares[name].append(steps / whole)
            print(
                f"| {name} | {seed} | {steps:,} | {steps / whole:.0%} | {loss:.3g} | {ended} of {TRIALS} |"
                f" {'yes' if chosen == best else 'no'} |",
                flush=True,
            )
    print("\nMean share of the steps: " + ", ".join(f"{name} {sum(s) / len(s):.0%}" for name, s in shares.items()))


if __name__ == "__main__":
    optuna.logging.set_verbosity(logging.ERROR)
    for package in ("pytorch_lightning.utilities.rank_zero", "lightning_utilities", "pytorch_lightning"):
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
