"""Aim: all defaults together cost at most 6 % over the first 1,000 steps, advance and cold starts included.

Pairs of runs, one without and one with ``StabilityMonitor(), StopOnInstability()``, one after the other, in both orders
in turn, on the same batches. Prints for each network the ratio of the processor's times with its 90 % interval
(Student's, of the logarithms of the pairs), over the first half of the steps and the second, the ratio of the fastest
of either kind (other work on a machine can only add time), and what the runs had for it: readings of each quantity, the
largest gap of ``stability/courant`` after step 100, and what was left out. ``--steps 2000`` shows what 1,000 steps cost
after the first 1,000. Set ``$MNIST`` to a folder with MNIST and text; otherwise the data are noise, of the same size.
"""

import argparse
import logging
import math
import time
import warnings
from itertools import pairwise
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from models import TRAININGS, Training
from pytorch_lightning.loggers import CSVLogger
from scipy import stats

from lsp_callbacks import StabilityMonitor, StopOnInstability

#: Network, steps, and pairs of runs.
DEFAULT = {"MLP": (1000, 7), "CNN": (1000, 7), "char transformer": (1000, 7), "GPT-2 10 M": (300, 3)}
WARM = 20


class Clock(pl.Callback):
    """Takes the processor's time at the beginning, in the middle and at the end of training."""

    def __init__(self, steps: int):
        self.marks, self.times = {steps // 2, steps}, [math.nan]

    def on_train_start(self, *args: Any) -> None:
        self.times = [time.process_time()]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in self.marks:
            self.times.append(time.process_time())


def seconds(training: Training, steps: int, seed: int, callbacks: list[pl.Callback]) -> list[float]:
    """Of the first and of the second half of the steps."""
    pl.seed_everything(seed, verbose=False)
    clock = Clock(steps)
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps, max_epochs=-1, logger=CSVLogger(folder), enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, clock],
        )  # fmt: skip
        trainer.fit(training.module(), training.loader())
    if len(clock.times) != 3:
        raise RuntimeError(f"the run was stopped at step {trainer.global_step} of {steps}: choose another rate")
    return [b - a for a, b in pairwise(clock.times)]


def interval(ratios: list[float]) -> str:
    """Geometric mean, and where it lies by 90 %."""
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) == 1:
        return f"{ratios[0]:.3f}"
    half = stats.t.ppf(0.95, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(mean(logs) + side * half) for side in (-1, 0, 1))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def readings(monitor: StabilityMonitor) -> str:
    """How often each quantity was measured."""
    counts = {name: pace.count for name, pace in monitor.monitor.cadence.paces.items()}
    prices = {name: pace.price for name, pace in monitor.monitor.cadence.paces.items()}
    return ", ".join(f"{name} {count} of {prices[name]:.2g} gradients" for name, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"all of {', '.join(DEFAULT)}")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pairs", type=int)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for name in options.networks or DEFAULT:
        steps, pairs = DEFAULT.get(name, (1000, 7))
        steps, pairs = options.steps or steps, options.pairs or pairs
        training = TRAININGS[name]
        seconds(training, WARM, 0, [StabilityMonitor(), StopOnInstability(verbose=False)])  # imports and first calls
        without, ours = [], []
        for seed in range(pairs):
            monitor = StabilityMonitor()
            for kind in (False, True) if seed % 2 else (True, False):
                callbacks = [monitor, StopOnInstability(verbose=False)] if kind else []
                (ours if kind else without).append(seconds(training, steps, seed, callbacks))
        halves = [[a[i] / b[i] for a, b in zip(ours, without)] for i in (0, 1)]
        whole = [sum(a) / sum(b) for a, b in zip(ours, without)]
        fastest = min(map(sum, ours)) / min(map(sum, without))
        found = monitor.history["stability/courant"].steps
        gap = max((b - a for a, b in pairwise([*found, steps]) if b > 100), default=steps)
        print(
            f"{name}: {interval(whole)} times the processor's time without, over {pairs} pairs of {steps} steps; first "
            f"half {interval(halves[0])}, second half {interval(halves[1])}, fastest over fastest {fastest:.3f}\n"
            f"  {readings(monitor)}; largest gap of the Courant number after step 100: {gap} steps",
            flush=True,
        )
        for skipped, reason in monitor.skipped.items():
            print(f"  without {skipped}: {reason}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # less noise
    main()
