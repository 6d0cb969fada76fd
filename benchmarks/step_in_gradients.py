"""Question: how many gradients does a whole training step take, and how many more one at which the headline is read?

Trains with Lightning, a logger and one logged value, and times a forward and a backward pass of each step's batch
beside the step itself, by the processor's time. Prints the ratio of the sums and what the model says, which should not
be more.

``--headline`` reads `MeanSquareStability` at every second step instead, and prints the median difference of measured
steps and others over the median gradient, once the first checks are over: everything counts, from the first hook to the
last. A quarter of the readings of the CNN correct for the statistics of the batch, which the mean shows. Beside it, on
the MLP, what the products and eigenvalues of a reading take where nothing else is done: bare calls of torch on the same
number of rows, whose activations are there already, in turn with the steps, so from the same cold cache; and in a loop.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from models import TRAININGS, Training, adam, images, mlp
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.cost import step_cost

STEPS, WARM = 120, 20
#: Of the headline number: with AdamW a reading is cheaper once the second moment holds 100 gradients.
READINGS, FIRST, EVERY = 80, 110, 2
HEADLINE = {
    "MLP": TRAININGS["MLP"],
    "MLP, AdamW": Training(mlp, partial(images, 4000), 128, adam),
    "CNN": TRAININGS["CNN"],
    "char transformer": TRAININGS["char transformer"],
}


class Clock(pl.Callback):
    """Times a gradient before each step, and the step."""

    def __init__(self) -> None:
        self.gradients, self.steps, self._began = [], [], None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if self._began is not None:
            self.steps.append(now - self._began)
        began = time.process_time()
        loss = F.cross_entropy(module.net(batch[0]).flatten(0, -2), batch[1].flatten())
        torch.autograd.grad(loss, [*module.parameters()])
        self._began = time.process_time()
        self.gradients.append(self._began - began)


class HeadlineClock(Clock):
    """Times the bare operations of a reading, too, where the network is an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.bare: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if isinstance(module.net, nn.Sequential) and all(
            isinstance(m, nn.Linear | nn.Tanh | nn.Flatten) for m in module.net
        ):
            held = activations(module.net, batch[0][: max(32, len(batch[0]) // 4)])
            began = time.process_time()
            bare_reading(*held)
            self.bare.append(time.process_time() - began)
            self._began = time.process_time()


@torch.no_grad()
def activations(net: nn.Sequential, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the inputs of the linear layers, their weights and the outputs."""
    inputs, weights = [], []
    for layer in net:
        if isinstance(layer, nn.Linear):
            inputs.append(x)
            weights.append(layer.weight)
        x = layer(x)
    return inputs, weights, x


@torch.no_grad()
def bare_reading(inputs: list[Tensor], weights: list[Tensor], outputs: Tensor) -> Tensor:
    """Return the top of a Gram matrix of rows, by six products for the outputs' and four for the noise's."""
    p = outputs.softmax(-1)
    u = p * (1 - p)
    for _ in range(6):
        u = p * u - p * (p * u).sum(-1, keepdim=True)
        u = u / u.norm(dim=-1, keepdim=True)
    g, gram = u, 0.0
    for x, weight in zip(reversed(inputs), reversed(weights)):
        gram = gram + (x @ x.T + 1) * (g @ g.T)
        if x is not inputs[0]:
            g = (g @ weight) * (1 - x * x)
    values, vectors = torch.linalg.eigh(gram)
    c, rows = vectors[:, -1], vectors * values.clamp_min(0).sqrt()
    for _ in range(4):
        c = ((rows @ ((rows.T * c) @ rows)) * rows).sum(1)
        c = c / c.norm()
    return c


def headline(name: str) -> None:
    """Print what a reading of the headline number takes in a step."""
    pl.seed_everything(0, verbose=False)
    clock = HeadlineClock()
    monitor = StabilityMonitor(["mean_square_stability"], every_n_steps=EVERY)
    module = fitted(HEADLINE[name], [clock, monitor], FIRST + EVERY * READINGS)
    steps, gradient = clock.steps[FIRST:], median(clock.gradients[FIRST:])
    others = median(steps[1::EVERY])  # FIRST is even
    more = [(step - others) / gradient for step in steps[::EVERY]]
    text = f"{name}: a reading takes {median(more):.2f} gradients, {fmean(more):.2f} in the mean"
    if clock.bare:
        held = activations(module.net, next(iter(HEADLINE[name].loader()))[0][:32])
        loop = []
        for _ in range(READINGS):
            began = time.process_time()
            bare_reading(*held)
            loop.append(time.process_time() - began)
        bare = median(clock.bare[FIRST:])
        text += f"; its bare operations {bare / gradient:.2f}, in a loop {median(loop) / gradient:.2f}"
    print(text, flush=True)


def fitted(training: Training, callbacks: list[pl.Callback], steps: int) -> Any:
    """Train, and return the module."""
    module = training.module()
    with TemporaryDirectory() as folder:
        pl.Trainer(
            max_steps=steps, max_epochs=-1, logger=CSVLogger(folder), enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        ).fit(module, training.loader())  # fmt: skip
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--headline", action="store_true")
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    options = parser.parse_args()
    if options.headline:
        for name in options.networks or HEADLINE:
            headline(name)
        return
    for name in options.networks or ["MLP", "CNN", "char transformer"]:
        pl.seed_everything(0, verbose=False)
        clock, said = Clock(), []
        monitor = StabilityMonitor(["courant_step"], every_n_steps=STEPS)
        monitor.observer.listeners.append(lambda snapshot: said.append(step_cost(snapshot)))  # noqa: B023
        for callback, steps in ((clock, STEPS), (monitor, 2)):
            fitted(TRAININGS[name], [callback], steps)
        ratio = sum(clock.steps[WARM:]) / sum(clock.gradients[WARM:-1])
        print(f"{name}: a step takes {ratio:.2f} gradients, the model says {said[0]:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
