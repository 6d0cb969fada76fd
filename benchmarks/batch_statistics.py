"""Claim: under BatchNorm the headline number is that of the training step, its statistics included, within scatter.

A residual network with BatchNorm on digits, batches of 64, 300 steps. Every tenth step the headline number is read with
nothing set (32 rows from the step's own graph, statistics held, factors of `StatisticsFactors`), and beside it that of
the whole batch, whose rows are taken back through the statistics one by one. Prints 5 %, 50 % and 95 % of the ratios of
the Courant numbers, and of the ratios of means of three, as `StopOnInstability` takes them; and the median of both.

    python benchmarks/batch_statistics.py

| run | readings | read / one by one | means of three | median read | median one by one |
|---|---|---|---|---|---|
| SGD 0.05 | 30 | 0.83 / 1.01 / 1.16 | 0.90 / 1.04 / 1.15 | 1.78 | 1.66 |
| SGD 0.3 | 30 | 0.88 / 1.00 / 1.22 | 0.94 / 1.05 / 1.11 | 1.71 | 1.53 |
| AdamW 0.002 | 30 | 0.69 / 0.87 / 1.22 | 0.78 / 0.90 / 1.20 | 0.83 | 0.91 |

Below 1 is the calm side: a tenth in the median under AdamW.

"""

import copy
import logging
import warnings
from dataclasses import replace

import numpy as np
import pytorch_lightning as pl
import torch
from models import Residual
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.trajectory.coming_preconditioner import remembered_rule

RUNS = [("SGD", 0.05), ("SGD", 0.3), ("AdamW", 0.002)]
STEPS, READ, BATCH = 300, 10, 64


class Net(pl.LightningModule):
    def __init__(self, optimizer: str, lr: float):
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16), nn.ReLU(), Residual(16),
            nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Residual(32),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Before(pl.Callback):
    """The network and the batch of a step, before it is taken."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % READ == 0:
            self.net, self.x = copy.deepcopy(pl_module.net), batch[0].clone()


def exact_rows(net: nn.Module, x: Tensor, scale: dict) -> Tensor:
    """Return one row for each sample, ``(N, P)``: its top output direction, taken back through the statistics."""
    outputs = net(x)
    p = outputs.detach().softmax(1).double()
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    cotangents = torch.diag_embed(torch.ones(len(x))).unsqueeze(2) * (values[:, -1:].sqrt() * vectors[..., -1]).float()
    names, parameters = zip(*net.named_parameters())
    rows = torch.autograd.grad(outputs, parameters, cotangents, is_grads_batched=True)
    roots = [torch.as_tensor(scale[f"net.{name}"]).sqrt() for name in names]
    return torch.cat([(root * row).flatten(1) for root, row in zip(roots, rows)], dim=1)


def courant_numbers(optimizer: str, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the Courant numbers of one run, and those of rows that are taken back one by one."""
    torch.manual_seed(0)
    digits, read, exact = load_digits(), [], []
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target))
    monitor, before = StabilityMonitor("mean_square_stability", every_n_steps=READ), Before()
    (quantity,) = monitor.monitor.quantities.values()

    def compare(snapshot) -> None:
        sgd = quantity.latest
        rows = exact_rows(before.net, before.x, remembered_rule(snapshot).scale).double()
        kernel = replace(sgd.kernel, gram=rows @ rows.T, rows=1, samples=len(rows), chance=None, outputs=1)
        read.append(sgd.lr / sgd.mean_square_lr())
        exact.append(sgd.lr / replace(sgd, kernel=kernel).mean_square_lr())

    monitor.observer.listeners.append(compare)
    pl.Trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=[before, monitor], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Net(optimizer, lr), DataLoader(data, BATCH, shuffle=True, drop_last=True))  # fmt: skip
    return np.array(read), np.array(exact)


def means(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(3) / 3, "valid")


def shown(values: np.ndarray) -> str:
    return " / ".join(f"{value:.2f}" for value in np.quantile(values, [0.05, 0.5, 0.95]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| run | readings | read / one by one | means of three | median read | median one by one |")
    print("|---|---|---|---|---|---|")
    for run in RUNS:
        read, exact = courant_numbers(*run)
        ratios = shown(read / exact), shown(means(read) / means(exact))
        medians = f"{np.median(read):.2f} | {np.median(exact):.2f}"
        print(f"| {run[0]} {run[1]} | {len(read)} | {' | '.join(ratios)} | {medians} |")
