"""Runs that fail and healthy ones that look alarming, on scikit-learn's digits and on MNIST."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import fetch_openml, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 1500


@cache
def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))


@cache
def mnist(samples: int = 4000) -> TensorDataset:
    """The first images of MNIST's test file, from the folder ``$MNIST`` if that is set, otherwise from OpenML."""
    if "MNIST" in os.environ:
        folder = Path(os.environ["MNIST"])
        names = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
        raw = [gzip.decompress((folder / name).read_bytes()) for name in names]
        images, labels = (np.frombuffer(file, np.uint8, offset=skip) for file, skip in zip(raw, (16, 8)))
    else:
        images, labels = fetch_openml("mnist_784", version=1, as_frame=False, return_X_y=True)
        images, labels = images[60000:], labels[60000:].astype(int)
    x = torch.tensor(np.asarray(images, dtype=np.float32).reshape(-1, 1, 28, 28)[:samples] / 255)
    return TensorDataset((x - 0.13) / 0.31, torch.tensor(np.asarray(labels[:samples], dtype=np.int64)))


def constant(step: int) -> float:
    return 1.0


def ramp(step: int) -> float:
    return 300.0 ** (step / STEPS)


def jump(step: int) -> float:
    return 60.0 if step >= 700 else 1.0


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def warmup(step: int) -> float:
    return min(1.0, (step + 1) / 300)


def decay(step: int) -> float:
    return 0.1 ** (step // 500)


def restarts(step: int) -> float:
    """Cosine annealing with warm restarts: the rate jumps up by a factor of 100 every 500 steps."""
    return 0.01 + 0.495 * (1 + math.cos(math.pi * (step % 500) / 500))


def triangle(step: int) -> float:
    """One cycle, as in one-cycle training: up ten-fold and down again."""
    return 0.1 + 0.9 * (1 - abs(step - STEPS / 2) / (STEPS / 2))


@dataclass(frozen=True)
class Problem:
    """One training run.

    Attributes:
        net: "mlp" or "cnn".
        activation: of the hidden layers.
        lr: before the schedule.
        momentum: of SGD; None is AdamW.
        batch: None is full batch.
        schedule: the factor of the rate.
        squared: squared loss instead of cross-entropy.
        data: "digits" or "mnist".
        steps: of the run.
    """

    net: str
    activation: type[nn.Module]
    lr: float
    momentum: float | None = 0.0
    batch: int | None = 32
    schedule: Callable[[int], float] = constant
    squared: bool = False
    data: str = "mnist"
    steps: int = STEPS

    @property
    def fails(self) -> bool:
        return self.schedule in (ramp, jump)


T, R = nn.Tanh, nn.ReLU
PROBLEMS = {
    "ramp, SGD, tanh MLP, squared loss": Problem("mlp", T, 0.2, batch=64, schedule=ramp, squared=True, data="digits"),
    "ramp, SGD, tanh MLP, digits": Problem("mlp", T, 0.05, schedule=ramp, data="digits"),
    "ramp, SGD, ReLU MLP, digits": Problem("mlp", R, 0.05, schedule=ramp, data="digits"),
    "ramp, SGD, ReLU MLP": Problem("mlp", R, 0.01, schedule=ramp),
    "ramp, SGD, ReLU CNN": Problem("cnn", R, 0.01, schedule=ramp),
    "ramp, SGD, batch 8, tanh MLP": Problem("mlp", T, 0.005, batch=8, schedule=ramp),
    "ramp, momentum, tanh MLP": Problem("mlp", T, 0.001, 0.9, schedule=ramp),
    "ramp, momentum, ReLU MLP": Problem("mlp", R, 0.001, 0.9, schedule=ramp),
    "ramp, momentum, ReLU CNN": Problem("cnn", R, 0.001, 0.9, schedule=ramp),
    "ramp, momentum, ReLU MLP, digits": Problem("mlp", R, 0.005, 0.9, schedule=ramp, data="digits"),
    "ramp, AdamW, ReLU MLP": Problem("mlp", R, 0.0005, None, schedule=ramp),
    "ramp, AdamW, ReLU CNN": Problem("cnn", R, 0.0005, None, schedule=ramp),
    "jump, SGD, ReLU MLP": Problem("mlp", R, 0.03, schedule=jump),
    "jump, momentum, ReLU CNN": Problem("cnn", R, 0.005, 0.9, schedule=jump),
    "jump, AdamW, tanh MLP": Problem("mlp", T, 0.002, None, schedule=jump),
    "constant, SGD, tanh MLP, digits": Problem("mlp", T, 0.1, data="digits"),
    "constant, SGD, ReLU MLP": Problem("mlp", R, 0.05),
    "constant, SGD, ReLU CNN": Problem("cnn", R, 0.05),
    "constant, SGD, batch 4, ReLU MLP": Problem("mlp", R, 0.01, batch=4),
    "constant, SGD, batch 8, tanh MLP": Problem("mlp", T, 0.03, batch=8),
    "constant, momentum, ReLU MLP": Problem("mlp", R, 0.01, 0.9),
    "constant, momentum, 3 x higher, tanh MLP": Problem("mlp", T, 0.02, 0.9),
    "constant, momentum, ReLU CNN": Problem("cnn", R, 0.01, 0.9),
    "constant, AdamW, ReLU MLP": Problem("mlp", R, 0.001, None),
    "constant, AdamW, ReLU CNN": Problem("cnn", R, 0.002, None),
    "cosine, momentum, ReLU MLP": Problem("mlp", R, 0.02, 0.9, schedule=cosine),
    "warm-up, SGD, ReLU MLP": Problem("mlp", R, 0.1, schedule=warmup),
    "warm-up, AdamW, tanh MLP": Problem("mlp", T, 0.003, None, schedule=warmup),
    "one cycle, momentum, ReLU CNN": Problem("cnn", R, 0.02, 0.9, schedule=triangle),
    "warm restarts, momentum, ReLU MLP": Problem("mlp", R, 0.02, 0.9, schedule=restarts),
    "step decay, SGD, tanh MLP": Problem("mlp", T, 0.1, schedule=decay),
    "full-batch GD at the edge, tanh MLP, squared loss": Problem(
        "mlp", T, 2.0, batch=None, squared=True, data="digits"
    ),
}


def network(problem: Problem) -> nn.Module:
    act, size = problem.activation, 8 if problem.data == "digits" else 28
    if problem.net == "mlp":
        layers = [nn.Flatten(), nn.Linear(size**2, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), act(), nn.Conv2d(8, 16, 3, padding=1), act(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * (size // 4) ** 2, 10),
    )  # fmt: skip


class Classifier(pl.LightningModule):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem, self.net = problem, network(problem)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.problem.squared:
            return nn.functional.mse_loss(self.net(x), nn.functional.one_hot(y, 10).float())
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        problem = self.problem
        optimizer: torch.optim.Optimizer
        if problem.momentum is None:
            optimizer = torch.optim.AdamW(self.parameters(), lr=problem.lr)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=problem.lr, momentum=problem.momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, problem.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Losses(pl.Callback):
    """The loss and the rate of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def fit(problem: Problem, seed: int, callbacks: list[Any]) -> Losses:
    """Trains once."""
    pl.seed_everything(seed, verbose=False)
    data = digits() if problem.data == "digits" else mnist()
    loader = DataLoader(data, batch_size=problem.batch or len(data), shuffle=True)
    losses = Losses()
    trainer = pl.Trainer(
        max_steps=problem.steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, losses],
    )  # fmt: skip
    trainer.fit(Classifier(problem), loader)
    return losses
