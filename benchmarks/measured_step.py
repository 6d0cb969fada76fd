"""Question: how many gradients does a measured step take, beyond a step that is not measured?

Trains with Lightning, one quantity (or several, joined by commas) measured at every tenth step, and takes the
processor's time of each whole step, of hooks, copies, snapshot and logging, too; beside each step a forward and a
backward pass of its batch is timed. Of each measurement: its steps, less as many that are not measured, in units of
the median of those passes; the first ones, which are cold, do not count. Prints the median over the measurements, with
quartiles, and beside it the least that Hessian products by differences can take: the bare operations of torch
(parameters moved and put back, the passes, gradients as one vector, the difference, three inner products), times how
many products a measurement took in the mean.

``python benchmarks/measured_step.py [QUANTITY ...] [--network NAME] [--optimizers NAME ...]``; ``cost_of_each.py
--whole`` prints the same table. The numbers scatter by a fifth with other work on the machine.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial
from statistics import mean, median, quantiles
from typing import Any

import pytorch_lightning as pl
import torch
from models import TRAININGS, Task
from torch import Tensor, nn
from torch.nn import functional as F

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.curvature.finite_differences import Differences
from lsp_callbacks.quantities import REGISTRY

EVERY, READINGS, COLD = 10, 30, 4
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
}
QUANTITIES = ("sharpness", "lyapunov", "sharpness,lyapunov", "spectral_norm", "courant_step", "mean_square_stability")
HEAD = "| quantity | optimizer | gradients, median | quartiles | products | their bare operations |"


class Clock(pl.Callback):
    """Times each step, a gradient beside it, and now and then the bare operations of a product."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.gradients: list[float] = []
        self.products: list[float] = []
        self._began: float | None = None
        self._net: nn.Module | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if self._began is not None:
            self.steps.append(now - self._began)
        began = time.process_time()
        gradient = passes(module.net, batch)
        self.gradients.append(time.process_time() - began)
        if trainer.global_step % EVERY == EVERY // 2:
            self._net = self._net or copy.deepcopy(module.net)
            self.products.append(bare_product(self._net, batch, torch.cat([g.reshape(-1) for g in gradient])))
        self._began = time.process_time()


def passes(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())
    return torch.autograd.grad(loss, [*net.parameters()])


def bare_product(net: nn.Module, batch: tuple[Tensor, Tensor], gradient: Tensor) -> float:
    """Return the seconds of a difference of gradients along a vector, checks and all else left out."""
    parameters = [*net.parameters()]
    data, start = [p.data for p in parameters], [p.detach().clone() for p in parameters]
    v = gradient / torch.linalg.vector_norm(gradient)
    began = time.process_time()
    torch._foreach_add_(data, [d.view_as(p) for d, p in zip(v.split([p.numel() for p in data]), data)], alpha=1e-4)
    change = torch.cat([g.reshape(-1) for g in passes(net, batch)]).sub_(gradient)
    torch._foreach_copy_(data, start)
    float(torch.dot(gradient, v) + torch.dot(change, v) + torch.linalg.vector_norm(change))
    return time.process_time() - began


def row(names: Sequence[str], network: str, optimizer: str) -> str:
    """Train once, and return what the measurements took."""
    pl.seed_everything(0, verbose=False)
    clock, monitor, training = Clock(), StabilityMonitor(list(names), every_n_steps=EVERY), TRAININGS[network]
    length, taken, difference = max(REGISTRY[name]().least_steps for name in names), [0], Differences.difference

    def counted(self: Differences, *args: Any) -> Any:
        taken[0] += 1
        return difference(self, *args)

    Differences.difference = counted  # type: ignore[method-assign]
    try:
        trainer = pl.Trainer(
            max_steps=EVERY * READINGS, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, callbacks=[clock, monitor],
        )  # fmt: skip
        trainer.fit(Task(training.net(), OPTIMIZERS[optimizer]), training.loader())
    finally:
        Differences.difference = difference  # type: ignore[method-assign]
    unit, spent = median(clock.gradients), []
    for first in range(COLD * EVERY, len(clock.steps) - EVERY, EVERY):
        plain = median(clock.steps[first + length + 1 : first + EVERY])
        spent.append((sum(clock.steps[first : first + length]) - length * plain) / unit)
    low, middle, high = quantiles(spent, n=4)
    products = taken[0] / READINGS
    bare = products * mean(sorted(clock.products)[: len(clock.products) // 2 + 1]) / unit
    label = " + ".join(names)
    return f"| {label} | {optimizer} | {middle:.1f} | {low:.1f} to {high:.1f} | {products:.1f} | {bare:.1f} |"


def table(quantities: Sequence[str], network: str, optimizers: Sequence[str]) -> None:
    """Print a row for each quantity and optimizer."""
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    print(f"{network}:\n\n{HEAD}\n" + "|---" * (HEAD.count("|") - 1) + "|", flush=True)
    for quantity in quantities:
        for optimizer in optimizers:
            print(row(quantity.split(","), network, optimizer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantities", nargs="*", metavar="QUANTITY", default=QUANTITIES)
    parser.add_argument("--network", choices=TRAININGS, default="MLP")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    options = parser.parse_args()
    table(options.quantities, options.network, options.optimizers)
