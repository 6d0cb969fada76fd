"""Claim: with `RollBackOnInstability`, a run with a fault ends as good as one without the fault.

Faults of ``benchmarks/runs.py``: a corrupted batch (of a thousand times the size, or NaN), a learning rate that jumps,
and a transformer whose rate is far too high after a short warm-up. Beside each run stands the same problem without its
fault: no corrupted batch, the rate before the jump, the rate at which that transformer trains. Printed are the mean of
the last 50 losses and the accuracy over all samples at the end, without and with the callback at its defaults (for
corrupted batches with ``skip_batches``), and what it did. A run is as good if its loss is at most that of the worst of
the seeds without the fault, or its accuracy at most one point below theirs.

``MNIST=<folder> python benchmarks/roll_back.py`` prints the table in ``roll_back.md``; ``seeds=0,1`` chooses seeds,
other words are beginnings of names.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from cap_learning_rate import Accuracy
from runs import DATA, PROBLEMS, Classifier, Losses, Problem, constant, fit, warmup
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lsp_callbacks import RollBackOnInstability, StabilityMonitor

#: By name: the problem without the fault.
FAULTS = {
    "corrupted batch, 1000 x, SGD, ReLU MLP": {"corrupt": None},
    "corrupted batch, 30 x, momentum, ReLU CNN": {"corrupt": None},
    "corrupted batch, NaN, AdamW, ReLU MLP": {"corrupt": None},
    "jump, SGD, ReLU MLP": {"schedule": constant},
    "jump, momentum, ReLU CNN": {"schedule": constant},
    "jump, AdamW, transformer": {"schedule": constant},
    "short warm-up, AdamW 0.1, transformer": {"lr": 0.01, "schedule": warmup},
}


class Faulty(Classifier):
    """The batch is corrupted, not the step: it is as bad when it comes again."""

    bad: Any = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        (x, y), problem = batch, self.problem
        if problem.corrupt is None:
            return super().training_step(batch, batch_idx)
        if self.bad is None and self.global_step == int(0.4 * problem.steps):
            self.bad = x[:4].clone()
        if self.bad is not None and torch.equal(self.bad, x[:4]):
            x = problem.corrupt * x
        return F.cross_entropy(self.net(x), y)


def mean(losses: Sequence[float]) -> float:
    return sum(losses[-50:]) / len(losses[-50:])


def run(problem: Problem, seed: int) -> tuple[float, float, RollBackOnInstability]:
    """Train with returns; the loss at the end, the accuracy, and the callback."""
    pl.seed_everything(seed, verbose=False)
    data, accuracy, losses = DATA[problem.data](), Accuracy(), Losses()
    with tempfile.TemporaryDirectory() as folder:
        back = RollBackOnInstability(dirpath=folder, skip_batches=problem.corrupt is not None, verbose=False)
        trainer = pl.Trainer(
            max_steps=problem.steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[StabilityMonitor(), back, losses, accuracy],
        )  # fmt: skip
        loader = DataLoader(data, batch_size=problem.batch or len(data), shuffle=True)
        back.fit(trainer, Faulty(problem), loader)
    return mean(losses.values), accuracy.value, back


def plain(problem: Problem, seed: int) -> tuple[float, float]:
    accuracy = Accuracy()
    return mean(fit(problem, seed, [accuracy]).values), accuracy.value


def main(words: Sequence[str]) -> None:
    """Print the table."""
    seeds = next((tuple(map(int, w[6:].split(","))) for w in words if w.startswith("seeds=")), (0, 1))
    starts = tuple(w for w in words if not w.startswith("seeds=")) or ("",)
    print("| run | seed | without | accuracy | with returns | accuracy | returns (at: to, rate) | ", end="")
    print("without the fault, worst of the seeds | accuracy | as good |\n" + "|---" * 10 + "|")
    for name, change in ((name, change) for name, change in FAULTS.items() if name.startswith(starts)):
        problem = PROBLEMS[name]
        sound = [plain(replace(problem, **change), seed) for seed in seeds]
        worst, least = max(loss for loss, _ in sound), min(accuracy for _, accuracy in sound)
        for seed in seeds:
            before, (loss, accuracy, back) = plain(problem, seed), run(problem, seed)
            did = "; ".join(f"{each.at}: {each.state.step}, {each.scale:.2g}" for each in back.roll_backs) or "none"
            did += " then stopped" * (back.stop_step is not None)
            good = loss <= worst or accuracy >= least - 0.01
            print(
                f"| {name} | {seed} | {before[0]:.3g} | {before[1]:.1%} | {loss:.3g} | {accuracy:.1%} | {did} | "
                f"{worst:.3g} | {least:.1%} | {'yes' if good else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main(sys.argv[1:])
