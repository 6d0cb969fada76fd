"""Question: how well do the corrections of earlier readings stand for one that is not made?

A residual network with BatchNorm on digits, batches of 64, 600 steps. Every tenth step the headline number is read and
corrected by the statistics of its batch, see `lsp_callbacks.operators.sgd.held_statistics.RecentCorrections`. Rules by
which only some are corrected anew are applied to these factors afterwards, and the mean of three readings, as the
Courant number is, compared with that of three that are all corrected: 5 %, 50 % and 95 % of the ratios, from the tenth
reading on. Below 1 is the calm side.

    python benchmarks/corrections_scatter.py

| run | factor to the next | every 4th, the product | every 2nd, root of the last |
|---|---|---|---|
| SGD 0.05 | 0.62 / 1.01 / 1.49 | 1.02 / 1.20 / 1.49 | 1.04 / 1.19 / 1.33 |
| SGD 0.3 | 0.51 / 1.10 / 1.73 | 1.09 / 1.32 / 1.75 | 1.12 / 1.34 / 1.75 |
| AdamW 0.002 | 0.67 / 1.01 / 1.54 | 0.96 / 1.10 / 1.38 | 1.04 / 1.16 / 1.45 |
"""

import logging
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.sgd import held_statistics
from lsp_callbacks.operators.sgd.held_statistics import CORRECTED, RecentCorrections

RUNS = [("SGD", 0.05), ("SGD", 0.3), ("AdamW", 0.002)]
STEPS, READ, BATCH = 600, 10, 64


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(x + self.inner(x))


class Net(pl.LightningModule):
    def __init__(self, optimizer: str, lr: float):
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Block(32),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def factors(optimizer: str, lr: float) -> np.ndarray:
    """Return the corrections of the readings of one run."""
    torch.manual_seed(0)
    digits, found = load_digits(), []
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    monitor = StabilityMonitor("mean_square_stability", every_n_steps=READ)
    (quantity,) = monitor.monitor.quantities.values()
    monitor.observer.listeners.append(lambda snapshot: found.append(quantity.latest.kernel.correction))
    pl.Trainer(
        max_steps=STEPS, callbacks=[monitor], logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Net(optimizer, lr), DataLoader(TensorDataset(x, torch.tensor(digits.target)), BATCH, True))  # fmt: skip
    return np.array([factor for factor in found if factor != 1])


def by_the_product(exact: np.ndarray) -> np.ndarray:
    """Return the factors of a run in which every so many readings are corrected anew."""
    recent, used = RecentCorrections(), []
    for k, factor in enumerate(exact):
        if recent.is_due(k + 1):
            recent.add(factor)
        used.append(factor if recent.is_due(k + 1) else recent.value)
    return np.array(used)


def means(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(3) / 3, "valid")


def shown(values: np.ndarray) -> str:
    return " / ".join(f"{value:.2f}" for value in np.quantile(values, [0.05, 0.5, 0.95]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    held_statistics.CORRECTED = 1  # every reading
    exact_of = {run: factors(*run) for run in RUNS}
    held_statistics.CORRECTED = CORRECTED
    print("| run | factor to the next | every 4th, the product | every 2nd, root of the last |\n|---|---|---|---|")
    for run, exact in exact_of.items():
        root = exact.copy()
        root[1::2] = exact[: len(exact) - 1 : 2][: len(root[1::2])] ** 0.5
        ratios = [exact[1:] / exact[:-1], *(means(used) / means(exact) for used in (by_the_product(exact), root))]
        print(f"| {run[0]} {run[1]} | {' | '.join(shown(ratio[8:]) for ratio in ratios)} |")
