"""Question: how long is a step at which nothing is measured in the callbacks? The aim is 50 microseconds, and 0.5 %.

Trains a network with Lightning and ``StabilityMonitor()`` with ``StopOnInstability()`` at their defaults, between two
callbacks that read the processor time: what passes between the two in the hooks of a step is theirs, with the time that
Lightning takes to call them. Steps at which something is measured are left out. Printed are the median over the steps
of several runs with its quartiles, its share of a step, and how many functions of this package such a step enters;
beside it the same for one and for two callbacks that do nothing. A difference between whole runs with and without
callbacks would be of the same size as the difference between two runs without.

What a function costs depends on what else the processor does: after the passes of a step nothing of it is in the
cache. So the number of functions, which is the same on each machine, is the number to reduce.

Usage:
    python benchmarks/idle_hooks.py [--runs 3] [--steps 400]

"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lsp_callbacks
from lsp_callbacks import StabilityMonitor, StopOnInstability

PACKAGE = str(Path(lsp_callbacks.__file__).parent)
#: Steps before which the first measurements lie.
BEGIN = 60


class Classifier(pl.LightningModule):
    """A network and its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


class Clock:
    """The processor time of each idle step, in microseconds: between the first and the last callback, and of the rest.

    Attributes:
        between: of the callbacks between the two.
        rest: of all else.
    """

    def __init__(self, monitor: StabilityMonitor | None):
        self.monitor, self.between, self.rest = monitor, [], []
        self._entered = self._between = self._began = 0.0
        self._is_measured = True

    def enter(self, hook: str, step: int) -> None:
        """Read the clock before the callbacks' hook."""
        now = time.process_time()
        if hook == HOOKS[0]:
            if not self._is_measured and step > BEGIN:
                self.between.append(1e6 * self._between)
                self.rest.append(1e6 * (now - self._began - self._between))
            self._began, self._between, self._is_measured = now, 0.0, False
        self._entered = time.process_time()

    def leave(self) -> None:
        """Read the clock behind the callbacks' hook."""
        self._between += time.process_time() - self._entered
        self._is_measured |= self.monitor is not None and self.monitor.observer.is_pending


def hooks_that(call: Callable[[str, Any], None]) -> pl.Callback:
    """Return a callback that calls a function with the name of each hook and the trainer."""
    hooks = {hook: lambda self, trainer, *_, hook=hook: call(hook, trainer) for hook in HOOKS}
    return type("Hooks", (pl.Callback,), hooks)()


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """Return the network 784-256-256-10, for batches of 128."""
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), (128, 784)


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    """Return a small convolutional network, for batches of 64 pictures."""
    layers: list[nn.Module] = []
    for width, before in ((32, 1), (32, 32), (64, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10)), (64, 1, 28, 28)


def clocked(make: Callable, steps: int, callbacks: list[Any]) -> Clock:
    """Train, and return the clock."""
    torch.manual_seed(0)
    net, shape = make()
    clock = Clock(next((c for c in callbacks if isinstance(c, StabilityMonitor)), None))
    first = hooks_that(lambda hook, trainer: clock.enter(hook, trainer.global_step))
    last = hooks_that(lambda hook, trainer: clock.leave())
    batches = TensorDataset(torch.randn(20 * shape[0], *shape[1:]), torch.randint(10, (20 * shape[0],)))
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[first, *callbacks, last], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Classifier(net), DataLoader(batches, batch_size=shape[0]))
    return clock


def functions_entered(make: Callable) -> int:
    """Return how many functions of this package an idle step enters."""
    entered: list[str] = []
    counts: list[int] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.append(frame.f_code.co_name)

    def count(hook: str, trainer: Any) -> None:
        if hook == HOOKS[0]:
            counts.append(len(entered))
            entered.clear()
            sys.setprofile(note)

    clocked(make, BEGIN + 40, [hooks_that(count), StabilityMonitor(), StopOnInstability()])
    sys.setprofile(None)
    return int(statistics.median(counts[BEGIN:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| network | callbacks | us an idle step | quartiles | of a step of | share | functions entered |")
    print("|---|---|---|---|---|---|---|")
    for make in (mlp, cnn):
        for title, callbacks in (
            ("one that does nothing", lambda: [hooks_that(lambda hook, trainer: None)]),
            ("two that do nothing", lambda: [hooks_that(lambda hook, trainer: None) for _ in range(2)]),
            ("StabilityMonitor, StopOnInstability", lambda: [StabilityMonitor(), StopOnInstability()]),
        ):
            clocks = [clocked(make, settings.steps, callbacks()) for _ in range(settings.runs)]
            low, middle, high = statistics.quantiles([us for clock in clocks for us in clock.between], n=4)
            step = statistics.median(us for clock in clocks for us in clock.rest)
            entered = functions_entered(make) if "Monitor" in title else 0
            print(
                f"| {make.__name__} | {title} | {middle:.0f} | {low:.0f} to {high:.0f} | {step / 1e3:.2f} ms "
                f"| {middle / step:.2%} | {entered} |"
            )
