"""Claim: `MeanSquareStability`, from the step's own batch, follows that of 128 fixed samples over whole runs.

Every `EVERY` steps of runs of `STEPS`, each with its optimizer: the Courant number of the second moment from the step's
own batch, as it is measured by default; from 128 samples that were collected once and are trained on like the others;
from 128 *fresh* ones, of the batches that come next, which no update has seen yet; from 32 rows of those, taken by
size; and from 32 fixed samples. Ratios are printed by their quartiles, with the means of the numbers themselves. Ratios
below 1 are the falsely calm side. Seeds 1 and 2 are those of the table, seed 0 is what was looked at before.

    MNIST=folder python benchmarks/mean_square_agrees.py [--seeds 1 2] [name of a run ...]
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, quantiles

import torch
from runs import PROBLEMS, digits, mnist, network
from torch import Tensor, nn

from lsp_callbacks import MeanSquareStability
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.sgd.frozen_sgd import frozen_sgd
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.probes import Probes
from lsp_callbacks.step.snapshot import Snapshot

EVERY, STEPS = 25, 1500
NAMES = (
    "ramp, SGD, ReLU MLP, digits", "constant, SGD, tanh MLP, digits", "constant, SGD, batch 8, tanh MLP",
    "ramp, momentum, ReLU MLP, digits", "constant, momentum, ReLU MLP", "BatchNorm", "constant, AdamW, ReLU MLP",
    "constant, AdamW, ReLU CNN", "ramp, AdamW, ReLU MLP", "constant, AdamW, ReLU MLP, batch 128",
    "characters, batch 32", "characters, batch 8",
)  # fmt: skip
#: What is compared with what.
RATIOS = (("batch", "128 fixed"), ("batch", "128 fresh"), ("128 fresh", "128 fixed"), ("32 of fresh", "128 fresh"))
Run = tuple[nn.Module, torch.optim.Optimizer, Callable[[int], float], Iterator, Callable, int]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        norms = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)) for _ in range(2)]
        self.first, self.second = norms

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x).relu())).relu()


class Characters(nn.Module):
    def __init__(self, vocabulary: int, width: int = 32, length: int = 32):
        super().__init__()
        self.table, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.table(tokens) + self.place, mask=self.mask))


def images(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def text(net: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


def taken(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows], y[rows]


def problem(name: str) -> Run:
    """Network, optimizer, schedule, batches, loss and population."""
    if name == "BatchNorm":
        net: nn.Module = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), *(Block(16) for _ in range(3)), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(64, 10),
        )  # fmt: skip
        x, y = digits().tensors
        return net, torch.optim.SGD(net.parameters(), 0.02, 0.9), lambda step: 1.0, taken(x, y, 64), images, len(x)
    if name.startswith("characters"):
        letters = (Path(__file__).parents[1] / "README.md").read_text()
        alphabet = sorted(set(letters))
        codes = torch.tensor([alphabet.index(letter) for letter in letters])
        size, count = int(name.split()[-1]), len(codes) - 33

        def pieces() -> Iterator[Tensor]:
            while True:
                yield torch.stack([codes[i : i + 33] for i in torch.randint(count, (size,)).tolist()])

        net = Characters(len(alphabet))
        return net, torch.optim.AdamW(net.parameters(), 1e-3), lambda step: 1.0, pieces(), text, count
    chosen = PROBLEMS[name.removesuffix(", batch 128")]
    net = network(chosen)
    x, y = (digits() if chosen.data == "digits" else mnist()).tensors
    if chosen.momentum is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), chosen.lr)
    else:
        optimizer = torch.optim.SGD(net.parameters(), chosen.lr, chosen.momentum)
    size = 128 if name.endswith("128") else chosen.batch or len(x)
    return net, optimizer, lambda step: chosen.schedule(step / STEPS), taken(x, y, size), images, len(x)


def full(snapshot: Snapshot, probes: ProbeSet, most: int | None = None) -> float:
    """Return the Courant number of the second moment from collected samples."""
    sgd = frozen_sgd(snapshot, probes, most=most, squares="batch")
    return sgd.lr / sgd.mean_square_lr(tol=2e-3)


def readings(name: str, seed: int) -> dict[str, list[float]]:
    torch.manual_seed(seed)
    net, optimizer, schedule, batches, loss_of, population = problem(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    fixed, coming = Probes(128, None, None), [next(batches) for _ in range(17)]
    fixed.drop(population)
    metric = MeanSquareStability()
    values: dict[str, list[float]] = {key: [] for key in ("batch", "128 fixed", "128 fresh", "32 of fresh")}
    net.train()
    for step in range(STEPS):
        batch = coming.pop(0)
        coming.append(next(batches))
        measured = step % EVERY == 0 and step > 0
        fixed.add(batch)
        if measured:
            pending = PendingStep(net)
            pending.add(batch, loss_of)
        loss = loss_of(net, batch)
        optimizer.zero_grad()
        loss.backward()
        if not bool(loss.isfinite()):
            break
        if measured:
            fresh = Probes(128, None, None)
            fresh.drop(population)
            for other in coming:
                fresh.add(other)
            fresh.batch_size, fresh.forward_size = fixed.batch_size, fixed.forward_size
            own = partial(fixed.samples_of_step, pending, loss_of)
            snapshot = pending.snapshot(step, optimizer, loss=loss.detach().clone(), samples_of_step=own)
            try:
                of_fresh = fresh.probe_set(pending, loss_of)
                row = {
                    "batch": float(metric(snapshot)["stability/courant_mean_square"]),
                    "128 fixed": full(snapshot, fixed.probe_set(pending, loss_of)),
                    "128 fresh": full(snapshot, of_fresh),
                    "32 of fresh": full(snapshot, of_fresh, None if of_fresh.batches else 32),
                }
            except Unmeasurable as error:
                print(f"  step {step}: {error}")
                continue
            for key, value in row.items():
                values[key].append(value)
        optimizer.step()
        scheduler.step()
    return values


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("names", nargs="*", default=NAMES)
    given = parser.parse_args()
    print(f"| run | readings | {' | '.join(f'{a} / {b}' for a, b in RATIOS)} | means | above 1 |")
    print("|---|---|" + "---|" * (len(RATIOS) + 2))
    for name in given.names:
        runs = [readings(name, seed) for seed in given.seeds]
        values = {key: [value for run in runs for value in run[key]] for key in runs[0]}
        cells = []
        for key, beside in RATIOS:
            low, middle, high = quantiles([a / b for a, b in zip(values[key], values[beside]) if b > 0], n=4)
            cells.append(f"{low:.2f}, {middle:.2f}, {high:.2f}")
        means = ", ".join(f"{mean(values[key]):.3g}" for key in values)
        above = ", ".join(str(sum(v > 1 for v in values[key])) for key in values)
        print(f"| {name} | {len(values['batch'])} | {' | '.join(cells)} | {means} | {above} |", flush=True)


if __name__ == "__main__":
    main()
