"""Claim: watching every step for NaN and Inf costs next to nothing, where anomaly mode costs a good part of the step.

Rounds of three runs in changing order, on random images of MNIST's size: plain, with ``StabilityMonitor(["numerics"])``
whose cadence is so long that one step is measured, and with ``Trainer(detect_anomaly=True)``. The time of a run is the
lower quartile over its steps of the processor's time from one step to the next; the first steps, with what is measured
there, are not among them. Prints, for each model, the ratio to the plain run: of the least over all rounds, as other
work on a machine can only add time, and the median of the ratios within rounds.
"""

import logging
import time
import warnings
from itertools import pairwise
from statistics import median

import pytorch_lightning as pl
import torch
from overhead import Classifier, cnn, mlp
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor

KINDS = ("plain", "numerics", "anomaly mode")
WARM_UP = 20


class Clock(pl.Callback):
    """The processor's time when each step begins."""

    def __init__(self):
        self.times: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.times.append(time.process_time())

    @property
    def quartile(self) -> float:
        steps = sorted(b - a for a, b in pairwise(self.times[WARM_UP:]))
        return steps[len(steps) // 4]


def seconds(build, steps: int, batch: int, kind: str) -> float:
    pl.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4096, 1, 28, 28, generator=generator)
    loader = DataLoader(TensorDataset(images, images.flatten(1)[:, :10].argmax(1)), batch_size=batch, shuffle=True)
    clock = Clock()
    ours = [StabilityMonitor(["numerics"], every_n_steps=10**9)] if kind == "numerics" else []
    trainer = pl.Trainer(
        max_steps=WARM_UP + steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*ours, clock],
        detect_anomaly=kind == "anomaly mode",
    )  # fmt: skip
    trainer.fit(Classifier(build()), loader)
    return clock.quartile


def main(rounds: int = 7) -> None:
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, build, steps, batch in (
        ("MLP 784-256-256-10, batch 128", mlp, 300, 128),
        ("CNN, batch 64", cnn, 60, 64),
    ):
        runs: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for k in range(rounds):
            for kind in KINDS[k % 3 :] + KINDS[: k % 3]:
                runs[kind].append(seconds(build, steps, batch, kind))
        for kind in KINDS[1:]:
            ratios = [own / plain for own, plain in zip(runs[kind], runs["plain"])]
            print(
                f"{name}, {1e3 * min(runs['plain']):.2f} ms a step: {kind} {min(runs[kind]) / min(runs['plain']):.3f} "
                f"times (least over least), {median(ratios):.3f} (median of {rounds} rounds)",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)  # less noise
    main()
