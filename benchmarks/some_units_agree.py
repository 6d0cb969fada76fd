"""Claim: on transformers under AdamW some units of each large layer and few rows do not make the headline number calm.

Along whole runs with nothing but a pace set: the Courant number of the second moment as `MeanSquareStability` reads it
from the graph of the step; the same run again with the gradients of *all* units of each layer; and that of the full
measurement, the second moment at the 128 samples of `SGDStability`. Ratios are printed by their quartiles, with the
means of the numbers; below 1 is the falsely calm side. Names of networks choose some. At a batch of 8 rows of the last
steps are kept as sketches, and no units are left out: there the two runs are the same.

    MNIST=folder python benchmarks/some_units_agree.py [--seeds 0 1 2 3] [NETWORK ...]
"""

import argparse
import logging
import math
import warnings
from functools import partial
from statistics import mean, quantiles
from typing import Any

import pytorch_lightning as pl
import torch
from models import TRAININGS, Training, adam, gpt2, text

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.sgd import parameter_gram

#: Steps of a run, and between two readings.
STEPS, EVERY = 180, 30
NETWORKS = {
    "char transformer": TRAININGS["char transformer"],
    "GPT-2, 2 layers": Training(partial(gpt2, 512, 64, 96, 2, 4), partial(text, 400, 512, 64), 8, adam),
}


class Numbers(pl.Callback):
    """The numbers of one run by their steps, without those that are not known.

    Args:
        monitor: whose readings they are.

    Attributes:
        full: of the full measurement.
    """

    def __init__(self, monitor: StabilityMonitor):
        self.monitor = monitor
        self.full: dict[int, float] = {}
        self._seen: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        quantities = self.monitor.monitor.quantities
        latest = quantities["sgd_stability"].latest if "sgd_stability" in quantities else None
        if latest is not None and latest is not self._seen:
            self._seen = latest
            self.full[trainer.global_step - 1] = latest.lr / latest.mean_square_lr(tol=2e-3)

    @property
    def headline(self) -> dict[int, float]:
        curve = self.monitor.history["stability/courant_mean_square"]
        return {step: float(value) for step, value in zip(curve.steps, curve.values) if math.isfinite(value)}


def run(training: Training, seed: int, *, with_full: bool) -> tuple[dict[int, float], dict[int, float]]:
    """Return the headline numbers and the full ones of one run, by step."""
    pl.seed_everything(seed, verbose=False)
    pace = {"mean_square_stability": EVERY} | ({"sgd_stability": EVERY} if with_full else {})
    numbers = Numbers(StabilityMonitor([*pace], every_n_steps=pace, max_memory="8GB"))
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[numbers.monitor, numbers],
    )  # fmt: skip
    trainer.fit(training.module(), training.loader())
    return numbers.headline, numbers.full


def readings(training: Training, seed: int) -> list[tuple[float, float, float]]:
    """Return the numbers from some units, from all units, and of the full measurement; NaN where there is none."""
    some, full = run(training, seed, with_full=True)
    few, parameter_gram.FEW_ENTRIES = parameter_gram.FEW_ENTRIES, 10**12
    try:
        every, _ = run(training, seed, with_full=False)
    finally:
        parameter_gram.FEW_ENTRIES = few
    return [(some[step], every[step], full.get(step, math.nan)) for step in sorted(some.keys() & every.keys())]


def quartiles(pairs: list[tuple[float, float]]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in quantiles([a / b for a, b in pairs], n=4))


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"all of {', '.join(NETWORKS)}")
    options = parser.parse_args()
    print("| network | readings | some / all units | full ones | some units / full | means of these |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.networks or NETWORKS:
        rows = [row for seed in options.seeds for row in readings(NETWORKS[name], seed)]
        both = [(some, full) for some, _, full in rows if math.isfinite(full) and full > 0]
        cells = [
            name, str(len(rows)), quartiles([(some, every) for some, every, _ in rows]), str(len(both)),
            quartiles(both), ", ".join(f"{mean(numbers):.3g}" for numbers in zip(*both)),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
