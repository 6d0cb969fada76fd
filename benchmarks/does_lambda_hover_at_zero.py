"""Question (Chemnitz & Engel 2025, Sec. 2.6): does lambda hover at 0 along SGD, as sharpness does at 2 / lr along GD?

Found: not in general. With squared loss lr / critical_lr ends at 1.0 for GD, 0.8 to 1.0 for batch 32, 0.6 to 0.9 for 8
and 0.4 to 0.8 for 2, at rates that GD bears at its edge; with cross-entropy it falls to 0 as the samples are fitted.

``MNIST=folder python benchmarks/does_lambda_hover_at_zero.py`` prints the tables of the ``.md`` and saves the ``.png``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from runs import Problem, digits, mnist, network
from torch import Tensor, nn

from lsp_callbacks import ProbeSet, SGDStability, Snapshot
from lsp_callbacks.functional import critical_lr, gd_critical_lr
from lsp_callbacks.operators.sgd.frozen_sgd import frozen_sgd
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.module_modes import evaluating

SAMPLES, STEPS, EVERY, SEEDS = 256, 4000, 200, (0, 1, 2)
BATCHES = (None, 32, 8, 2)
LATE, TICKS = 2 * STEPS // 3, ((0.3, 0.4, 0.5, 0.6, 0.8, 1, 2, 4), (0.01, 0.1, 1, 10))
#: Of each panel: the problem, and a lower and a higher rate of each batch size.
PANELS: dict[str, tuple[Problem, dict[int | None, tuple[float, float]]]] = {
    "digits, tanh, squared": (
        Problem("mlp", nn.Tanh, 0, squared=True, data="digits"), dict.fromkeys(BATCHES, (0.5, 1.0))
    ),
    "MNIST, tanh, squared": (Problem("mlp", nn.Tanh, 0, squared=True), dict.fromkeys(BATCHES, (0.25, 0.5))),
    "MNIST, ReLU, squared": (Problem("mlp", nn.ReLU, 0, squared=True), dict.fromkeys(BATCHES, (0.25, 0.4))),
    "digits, tanh, cross-entropy": (
        Problem("mlp", nn.Tanh, 0, data="digits"), {None: (1.0, 1.5), 32: (0.5, 1.0), 8: (0.25, 0.5), 2: (0.05, 0.1)}
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """NaN after the loss overflowed, and for ``batch_sharpness`` before the last third."""

    steps: list[int]
    courant: list[float]
    mean_square: list[float]
    batch_sharpness: list[float]
    loss: float
    at_end: Task


@cache
def training_set(data: str) -> tuple[Tensor, Tensor]:
    images, labels = (digits() if data == "digits" else mnist())[:SAMPLES]
    return images, labels


class Task:
    """A network, its training set and its optimizer."""

    def __init__(self, problem: Problem, seed: int):
        torch.manual_seed(seed)
        self.problem, self.batch = problem, problem.batch or SAMPLES
        self.net, (self.x, self.y) = network(problem), training_set(problem.data)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=problem.lr)

    def criterion(self, outputs: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        if self.problem.squared:
            return nn.functional.mse_loss(outputs, nn.functional.one_hot(self.y[index], 10).float())
        return nn.functional.cross_entropy(outputs, self.y[index])

    def loss(self, index: Tensor | slice = slice(None)) -> Tensor:
        return self.criterion(self.net(self.x[index]), index)

    def part(self) -> Any:
        with evaluating(self.net):
            return evaluation(self.net(self.x), self.criterion, samples=SAMPLES)

    def snapshot(self, step: int) -> Snapshot:
        probes = ProbeSet(self.net, (self.part,), SAMPLES, self.batch, SAMPLES)
        return Snapshot(step=step, module=self.net, replay=self.loss, optimizer=self.optimizer, probes=probes)

    def batch_sharpness(self, draws: int = 16) -> float:
        """``E[g_B H_B g_B / |g_B|^2] lr / 2`` (Andreyev & Beneventano 2025)."""
        generator, ratios = torch.Generator().manual_seed(0), []
        parameters = list(self.net.parameters())
        for _ in range(draws if self.batch < SAMPLES else 1):
            index = torch.randperm(SAMPLES, generator=generator)[: self.batch]
            gradient = torch.autograd.grad(self.loss(index), parameters, create_graph=True)
            fixed = [g.detach() for g in gradient]
            product = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradient, fixed)), parameters)
            square = sum(v.square().sum() for v in fixed)
            ratios.append(float(sum((p * v).sum() for p, v in zip(product, fixed)) / square))
        return fmean(ratios) * self.problem.lr / 2


def run(problem: Problem, seed: int, steps: int = STEPS) -> Outcome:
    """Trains once, in shuffled epochs, and measures with batches drawn in the same way."""
    task = Task(problem, seed)
    dial = SGDStability(SAMPLES, sampling="reshuffle", steps=256)
    epoch = SAMPLES // task.batch
    found: dict[str, list[float]] = {"courant": [], "mean_square": [], "batch_sharpness": []}
    for step in range(steps + 1):
        if step % epoch == 0:
            order = torch.randperm(SAMPLES).view(epoch, -1)
        if step % EVERY == 0:
            with torch.no_grad():
                loss = float(task.loss())
            if not math.isfinite(loss):
                break
            dial.update(task.snapshot(step))
            values = {key.split("/")[1]: float(value) for key, value in dial.compute().items()}
            found["courant"].append(values["courant_sgd"])
            found["mean_square"].append(values["courant_mean_square"])
            found["batch_sharpness"].append(task.batch_sharpness() if step >= LATE else math.nan)
        task.optimizer.zero_grad()
        task.loss(order[step % epoch]).backward()
        task.optimizer.step()
    measured = list(range(0, steps + 1, EVERY))
    padded = {name: values + [math.nan] * (len(measured) - len(values)) for name, values in found.items()}
    return Outcome(measured, loss=loss, at_end=task, **padded)


def row(name: str, batch: int | None, lr: float, outcomes: list[Outcome]) -> str:
    cells = []
    for kind in ("courant", "mean_square", "batch_sharpness"):
        late = np.array([getattr(o, kind) for o in outcomes])[:, np.array(outcomes[0].steps) >= LATE]
        low, middle, high = np.nanquantile(late, (0.1, 0.5, 0.9))
        cells.append(f"{middle:.2f} ({low:.2f} ... {high:.2f})")
    largest = np.nanmax([o.courant[1:] for o in outcomes])
    end = f"{largest:.2f} | {fmean(o.loss for o in outcomes):.1e}"
    return f"| {name} | {batch or 'all (GD)'} | {lr:g} | {' | '.join(cells)} | {end} |"


def figure(results: dict[tuple[str, int | None, int], list[Outcome]]) -> Figure:
    fig = Figure(figsize=(15, 7), layout="constrained")
    axes = fig.subplots(2, len(PANELS), sharex=True, sharey="col", squeeze=False)
    for (which, column), ax in np.ndenumerate(axes):
        name, rates = list(PANELS)[column], list(PANELS.values())[column][1]
        for k, batch in enumerate(BATCHES):
            outcomes = results[name, batch, which]
            values = np.array([o.courant for o in outcomes]).clip(0.003)
            color = "black" if batch is None else f"C{k - 1}"
            label = ("GD" if batch is None else f"batch {batch}") + f", lr {rates[batch][which]:g}"
            ax.plot(outcomes[0].steps, np.median(values, 0), color=color, label=label)
            ax.fill_between(outcomes[0].steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        ax.axhline(1, color="gray", linestyle="--", linewidth=1)
        ax.set(yscale="log", title=f"{name}: {('lower', 'higher')[which]} rate")
        ax.minorticks_off()
        ax.yaxis.set_major_locator(FixedLocator(TICKS["entropy" in name]))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(fontsize=8)
    fig.supxlabel("step")
    fig.supylabel("lr / critical_lr  (below 1: lambda < 0)")
    return fig


def check(task: Task) -> str:
    """At the same weights: the sharpness, and the Courant number on a finer grid, by other draws, of all outputs."""
    lr, start = task.problem.lr, None
    for _ in range(5):  # the sharpest mode from a warm start
        start = (top := frozen_sgd(task.snapshot(STEPS), start=start)).kernel.mode
    cells, draws = [f"{lr / gd_critical_lr(top.modes):.3f}"], [(top, "reshuffle", 1000), (top, "iid", 1000)]
    if task.problem.data == "digits":  # a minute each
        draws += [(frozen_sgd(task.snapshot(STEPS), outputs="all"), "reshuffle", 250)]
    for modes, sampling, steps in draws:
        how: dict[str, Any] = {"batch_size": task.batch, "sampling": sampling, "steps": steps, "grid": 1.01}
        found = critical_lr(modes.modes, tol=1e-3, **how)
        cells.append(f"{lr / found.value:.3f} ± {lr / found.value * found.error / found.value:.3f}")
    return " | ".join(cells + ["-"] * (4 - len(cells)))


def main() -> None:
    kinds = ("lr / critical_lr", "lr / mean_square_lr", "batch sharpness x lr / 2", "largest lr / critical_lr", "loss")
    print(f"| run | batch | lr | {' | '.join(kinds)} |", "|---" * 8 + "|", sep="\n")
    results = {}
    for name, (problem, rates) in PANELS.items():
        for which, batch in itertools.product((0, 1), BATCHES):
            lr = rates[batch][which]
            results[name, batch, which] = [run(replace(problem, batch=batch, lr=lr), seed) for seed in SEEDS]
            print(row(name, batch, lr, results[name, batch, which]), flush=True)
    figure(results).savefig(Path(__file__).with_suffix(".png"), dpi=75)
    kinds = ("sharpness x lr / 2", "reshuffled", "i.i.d.", "reshuffled, all outputs")
    print(f"\n| at the end, seed 0 | batch | lr | {' | '.join(kinds)} |", "|---" * 7 + "|", sep="\n")
    for (name, batch, which), outcomes in results.items():
        if which and batch and outcomes[0].at_end.problem.squared:
            lr = PANELS[name][1][batch][which]
            print(f"| {name} | {batch} | {lr:g} | {check(outcomes[0].at_end)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
