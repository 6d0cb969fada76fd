"""Claim: under BatchNorm, too, `StopOnInstability` hears of a failing run before its loss, and stops no healthy one.

Two populations of networks with BatchNorm on scikit-learn's digits: an MLP, a CNN and a residual CNN; SGD, momentum,
AdamW, with and without weight decay. *Failing*: the rate grows 150-fold, or is far too high from the start. *Healthy*:
constant rates, among them high ones, warm-up and one-cycle. Learning rates were chosen on seeds 10 and 11 without
looking at any dial, and no constant of the package was. Training goes on after a stop, so that the lead over the loss
alarm can be read. ``python benchmarks/batch_norm_runs.py [SEED ...] [NAME ...]`` prints the rows of
``batch_norm_runs.md`` (a quarter of an hour a seed); names are beginnings of those of the runs.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from runs import Losses, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_populations import Watch

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.report import loss_alarm

STEPS, BATCH, EVERY = 400, 32, 10
Schedule = Callable[[int], float]


def constant(step: int) -> float:
    return 1.0


def ramp(step: int) -> float:
    return 150.0 ** (step / STEPS)


def warmup(step: int) -> float:
    return min(1.0, (step + 1) / 60)


def one_cycle(step: int) -> float:
    """From a tenth up to 1 at 30 % of the run, then down as a cosine."""
    at = step / STEPS
    return 0.1 + 3 * at if at < 0.3 else 0.5 * (1 + math.cos(math.pi * (at - 0.3) / 0.7))


@dataclass(frozen=True)
class Problem:
    """One run: the network, the rate before its schedule, momentum (None is AdamW), and weight decay."""

    net: str
    lr: float
    momentum: float | None = 0.0
    decay: float = 0.0
    schedule: Schedule = constant
    fails: bool = False


FAILING = {
    "ramp, SGD": (0.1, 0.0, 0.0, ramp),
    "ramp, SGD, decay 5e-4": (0.1, 0.0, 5e-4, ramp),
    "ramp, momentum": (0.02, 0.9, 0.0, ramp),
    "ramp, momentum, decay 5e-4": (0.02, 0.9, 5e-4, ramp),
    "ramp, AdamW, decay 0.1": (0.02, None, 0.1, ramp),
    "too high, SGD": (10.0, 0.0, 0.0, constant),
    "too high, momentum": (2.0, 0.9, 0.0, constant),
}
HEALTHY = {
    "constant, SGD": (0.1, 0.0, 0.0, constant),
    "constant, SGD, 5 x higher, decay 5e-4": (0.5, 0.0, 5e-4, constant),
    "constant, momentum, decay 5e-4": (0.05, 0.9, 5e-4, constant),
    "warm-up, momentum": (0.1, 0.9, 0.0, warmup),
    "one-cycle, momentum, decay 5e-4": (0.3, 0.9, 5e-4, one_cycle),
    "constant, AdamW": (0.003, None, 0.0, constant),
    "one-cycle, AdamW, decay 0.1": (0.02, None, 0.1, one_cycle),
}
PROBLEMS = {
    f"{name}, {net}": Problem(net, *settings, fails=kind is FAILING)
    for kind in (FAILING, HEALTHY)
    for name, settings in kind.items()
    for net in ("MLP", "CNN", "residual CNN")
}


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.first(x)).relu()
        return (x + self.norms[1](self.second(inner))).relu()


def network(kind: str) -> nn.Module:
    if kind == "MLP":
        hidden = [[nn.Linear(a, 32), nn.BatchNorm1d(32), nn.ReLU()] for a in (64, 32)]
        return nn.Sequential(nn.Flatten(), *hidden[0], *hidden[1], nn.Linear(32, 10))
    first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    if kind == "CNN":
        second = nn.Conv2d(8, 16, 3, padding=1)
        body = [nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(16), nn.ReLU()]
    else:
        body = [Block(8), Block(8)]
    width = 64 if kind == "CNN" else 32
    return nn.Sequential(first, *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width, 10))


class Classifier(pl.LightningModule):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem, self.net = problem, network(problem.net)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        problem = self.problem
        optimizer: torch.optim.Optimizer
        if problem.momentum is None:
            optimizer = torch.optim.AdamW(self.parameters(), problem.lr, weight_decay=problem.decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), problem.lr, problem.momentum, weight_decay=problem.decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, problem.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Outcome:
    event: int | None
    stop: int | None
    alarm: int | None
    start: float
    end: float
    least: float
    largest: float
    readings: list[float]


def run(problem: Problem, seed: int, steps: int = STEPS) -> Outcome:
    """Trains once, with the dial measured every 10 steps."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(seed, verbose=False)
    monitor, watch, losses = StabilityMonitor(["sgd_stability"], every_n_steps=EVERY), Watch(verbose=False), Losses()
    pl.Trainer(
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor, watch, losses],
    ).fit(Classifier(problem), DataLoader(digits(), BATCH, shuffle=True, drop_last=True))  # fmt: skip
    alarm = loss_alarm(losses.values)
    dial, until = monitor.history["stability/courant"], len(losses.values) if alarm is None else alarm
    means = [sum(dial.values[i : i + 3]) / 3 for i in range(len(dial.values) - 2) if dial.steps[i + 2] < until]
    smooth = [sum(losses.values[max(0, i - 49) : i + 1]) / min(i + 1, 50) for i in range(len(losses.values))]
    return Outcome(
        event=watch.event_step,
        stop=watch.stop_step,
        alarm=alarm,
        start=losses.values[0],
        end=smooth[-1],
        least=min(smooth),
        largest=max(means, default=math.nan),
        readings=dial.values,
    )


def row(name: str, seed: int, o: Outcome) -> str:
    shown = ["-" if step is None else str(step) for step in (o.alarm, o.event, o.stop)]
    lead = f"{o.alarm - o.event:+d}" if o.alarm is not None and o.event is not None else ""
    above = f"{sum(value > 1 for value in o.readings)} of {len(o.readings)}"
    loss = f"{o.start:.2g}, least {o.least:.2g}, end {o.end:.2g}"
    return f"| {name} | {seed} | {' | '.join(shown)} | {lead} | {loss} | {o.largest:.2g} | {above} |"


def main(arguments: list[str]) -> None:
    seeds = [int(one) for one in arguments if one.isdecimal()] or [0]
    names = tuple(one for one in arguments if not one.isdecimal())
    head = ("run", "seed", "loss alarm", "event", "stop", "lead of event", "loss", "largest mean of 3", "above 1")
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for seed in seeds:
        for name, problem in PROBLEMS.items():
            if not names or name.startswith(names):
                print(row(name, seed, run(problem, seed)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
