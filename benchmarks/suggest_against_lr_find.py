"""Claim: the rate of ``lsp-callbacks suggest`` mostly trains better than that of Lightning's ``Tuner.lr_find``.

Six problems on scikit-learn's digits and diabetes, and a text where ``$MNIST`` has it (otherwise that one is left out).
Each is trained for 400 steps at a constant rate: the one that ``suggest`` says, the one that ``lr_find`` says at its
defaults, and the best of a grid of six rates, chosen with hindsight by the same loss. Printed are the rates, the mean
of the last 50 losses, how many gradients each suggestion took, and how often each ends lower than the other.

``MNIST=<folder> python benchmarks/suggest_against_lr_find.py seeds=4,5`` prints the table of
``suggest_against_lr_find.md``; other words are beginnings of names. ``shares`` trains at shares of the largest stable
rate instead.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from runs import DATA, Problem, R, T, network, short, words
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Unmeasurable
from lsp_callbacks.cli.suggest import suggest

STEPS, LAST = 400, 50
GRID = [4.0**-k for k in range(6)]
SHARES = (0.35, 0.5, 0.7, 1.0)


@cache
def diabetes() -> TensorDataset:
    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    return TensorDataset((x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None])


@dataclass(frozen=True)
class Task:
    """What is trained."""

    problem: Problem
    data: Callable[[], TensorDataset]
    net: Callable[[Problem], nn.Module] = network


def perceptron(problem: Problem) -> nn.Module:
    act = problem.activation
    return nn.Sequential(nn.Linear(10, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 1))


TASKS = {
    "MLP, SGD": Task(short("mlp", R, 0.0), DATA["digits"]),
    "MLP, momentum": Task(short("mlp", T, 0.0, 0.9), DATA["digits"]),
    "residual CNN with BatchNorm, momentum": Task(short("bn residual", R, 0.0, 0.9, batch=32), DATA["digits"]),
    "MLP, AdamW": Task(short("mlp", R, 0.0, None), DATA["digits"]),
    "char transformer, AdamW": Task(words(0.0), DATA["text"]),
    "regression, MLP, momentum": Task(short("mlp", T, 0.0, 0.9, batch=32), diabetes, perceptron),
}


class Module(pl.LightningModule):
    def __init__(self, task: Task, lr: float = 1e-3):
        super().__init__()
        self.problem, self.net, self.lr = task.problem, task.net(task.problem), lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        outputs, y = self.net(batch[0]), batch[1]
        return F.mse_loss(outputs, y) if y.is_floating_point() else F.cross_entropy(outputs.flatten(0, -2), y.flatten())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.problem.momentum is None:
            return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.problem.decay)
        return torch.optim.SGD(self.parameters(), self.lr, self.problem.momentum)


def trainer(steps: int) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip


def begin(task: Task, seed: int, lr: float = 1e-3) -> tuple[Module, DataLoader[Any]]:
    """Return the module with its initial weights, and a loader."""
    pl.seed_everything(seed, verbose=False)
    return Module(task, lr), DataLoader(task.data(), batch_size=task.problem.batch, shuffle=True)


def end(task: Task, seed: int, lr: float) -> float:
    """Train, and return the mean of the last losses; inf where they are not finite."""
    module, loader = begin(task, seed, lr)
    trainer(STEPS).fit(module, loader)
    mean = sum(module.losses[-LAST:]) / LAST
    return mean if math.isfinite(mean) else math.inf


def by_lr_find(task: Task, seed: int) -> tuple[float, int]:
    """Return the rate of `Tuner.lr_find` at its defaults (NaN if it has none), and the gradients that it took."""
    module, loader = begin(task, seed)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        finder = Tuner(trainer(STEPS)).lr_find(module, loader)
    rate = finder.suggestion() if finder is not None else None
    return math.nan if rate is None else float(rate), len(module.losses)


def shares(task: Task, name: str, seed: int) -> None:
    module, loader = begin(task, seed)
    found = suggest(trainer(STEPS), module, train_dataloaders=loader)
    ends = [end(task, seed, share * found.rate.value) for share in SHARES]
    print(f"| {name} | {seed} | {found.rate.value:.3g} |" + "".join(f" {loss:.3g} |" for loss in ends), flush=True)


def compare(task: Task, name: str, seed: int) -> tuple[float, float, float]:
    """Print a row, and return the three losses."""
    module, loader = begin(task, seed)
    try:
        suggestion = suggest(trainer(STEPS), module, train_dataloaders=loader)
        rate = suggestion.rate
        cost, said = suggestion.gradients, f"{rate.value:.2g} ({rate.low:.2g} to {rate.high:.2g})"
        ours = end(task, seed, rate.value)
    except Unmeasurable as error:
        ours, cost, said = math.inf, math.nan, str(error)
    found, gradients = by_lr_find(task, seed)
    theirs = end(task, seed, found) if found > 0 else math.inf
    ends = {lr: end(task, seed, lr) for lr in GRID}
    best = min(ends, key=lambda lr: ends[lr])
    print(
        f"| {name} | {seed} | {said} | {cost:.0f} | {ours:.3g} | {found:.2g} | {gradients} | {theirs:.3g} |"
        f" {best:.2g} | {ends[best]:.3g} |",
        flush=True,
    )
    return ours, theirs, ends[best]


def main(arguments: Sequence[str]) -> None:
    """Print the table that is asked for."""
    seeds = next((tuple(map(int, w[6:].split(","))) for w in arguments if w.startswith("seeds=")), (0,))
    starts = tuple(w for w in arguments if w != "shares" and not w.startswith("seeds=")) or ("",)
    tasks = {name: task for name, task in TASKS.items() if name.startswith(starts)}
    if "MNIST" not in os.environ:
        tasks.pop("char transformer, AdamW", None)
        print("without the char transformer: set MNIST to a folder with tinyshakespeare.txt")
    if "shares" in arguments:
        print("| problem | seed | largest stable |" + "".join(f" {share:g} |" for share in SHARES))
        print("|---" * (3 + len(SHARES)) + "|")
        for name, task in tasks.items():
            for seed in seeds:
                shares(task, name, seed)
        return
    print("| problem | seed | `suggest` | gradients | loss | `lr_find` | gradients | loss | grid | loss |")
    print("|---" * 10 + "|")
    ends = [compare(task, name, seed) for name, task in tasks.items() for seed in seeds]
    lower = sum(ours < theirs for ours, theirs, _ in ends)
    near = [sum(row[k] <= 1.5 * row[2] for row in ends) for k in (0, 1)]
    print(f"\n`suggest` ends lower than `lr_find` in {lower} of {len(ends)} runs; within 1.5 times the loss of the")
    print(f"best of the grid are {near[0]} and {near[1]} of them")


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for package in ("utilities.rank_zero", "callbacks.model_summary"):
        logging.getLogger(f"pytorch_lightning.{package}").setLevel(logging.ERROR)
    logging.getLogger("lightning_utilities").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
