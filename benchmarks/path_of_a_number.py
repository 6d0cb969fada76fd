"""How many files and calls a reader of one number passes through.

Usage:
    python benchmarks/path_of_a_number.py
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lsp_callbacks
from lsp_callbacks import StabilityMonitor

PACKAGE = str(Path(lsp_callbacks.__file__).parent)
QUANTITIES = ("sharpness", "sgd_stability", "stability_profile")


class Path_:
    """Counts of one training step."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            self.files.append(name.removeprefix(PACKAGE + "/"))

    @property
    def changes(self) -> int:
        return sum(a != b for a, b in zip(self.files, self.files[1:]))


class Traced(pl.Callback):
    def __init__(self, monitor: StabilityMonitor):
        self.monitor, self.step = monitor, Path_()
        self.last: Path_ | None = None
        self.seen: list = []

    def on_before_zero_grad(self, *_: Any) -> None:
        pass


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def paths(name):
    torch.manual_seed(0)
    monitor = StabilityMonitor([name], every_n_steps=1)
    found = []

    class Begin(pl.Callback):
        def on_train_batch_start(self, *_):
            self.path = Path_()
            self.count = sum(len(c.values) for c in monitor.history.values())
            sys.setprofile(self.path)

    class End(pl.Callback):
        def on_train_batch_end(self, *_):
            sys.setprofile(None)
            if sum(len(c.values) for c in monitor.history.values()) > begin.count:
                found.append(begin.path)

    begin, end = Begin(), End()
    x, y = torch.randn(256, 10), torch.randint(3, (256,))
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    trainer = pl.Trainer(
        max_steps=6,
        callbacks=[begin, monitor, end],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Net(), loader)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in QUANTITIES:
        for p in paths(name)[:3] + paths(name)[-1:]:
            print(name, len(set(p.files)), len(p.files), p.changes)
