"""Runs that are cut, saved and resumed."""

import pytorch_lightning as pl
import torch
from harness import CLASSES, FEATURES, MOMENTUM, Model, mlp
from torch import nn
from torch.utils.data import DataLoader, Dataset

STEPS = 200


class Stream(Dataset):
    """Data that depend on their position only."""

    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, i):
        x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        return x, x[:CLASSES].argmax()


class Repeatable(Model):
    """Masks that depend on the step only."""

    def __init__(self):
        super().__init__(mlp(nn.Dropout(0.3)), MOMENTUM)
        self.double()

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)
        return super().training_step(batch, batch_idx)


def stream(start=0):
    """One epoch, or the part of it that is left."""
    return DataLoader(Stream(), batch_size=4, sampler=range(4 * start, 4 * STEPS))


def curves(rows, start):
    """What was logged from a step on, the clock's reading excepted."""
    keys = {key for step, row in rows.rows for key in row if step >= start} - {"stability/overhead", "epoch"}
    return {key: {s: float(v) for s, v in rows.curve(key).items() if s >= start} for key in keys}


class Once(pl.Callback):
    """Writes one checkpoint after so many steps, in the middle of everything."""

    def __init__(self, folder, step):
        self.path, self.step = folder / "cut.ckpt", step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
