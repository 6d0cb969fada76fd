"""Claim: `MeanSquareStability`, from the step's own batch, follows the full measurement at 128 fixed samples over runs.

Whole runs, every `EVERY` steps. Printed for each: quartiles of the ratio of its Courant number to that of the second
moment from 128 samples collected once, and to ``courant_sgd`` of those; the same ratio for 16 rows of the batch, and
for 32 fixed samples; the mean of the readings over that of 128; and how many readings of each are above 1. Ratios below
1 are the falsely calm side.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, quantiles

import torch
from runs import PROBLEMS, digits, mnist, network
from torch import Tensor, nn

from lsp_callbacks import MeanSquareStability
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional import critical_lr
from lsp_callbacks.functional.sgd.mean_square import mean_square_lr
from lsp_callbacks.operators.sgd.frozen_sgd import frozen_sgd
from lsp_callbacks.quantities.sgd.frozen_exponents import batches_of
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.probes import Probes
from lsp_callbacks.step.snapshot import Snapshot

EVERY, STEPS = 25, 1500
NAMES = (
    "ramp, SGD, ReLU MLP, digits", "ramp, momentum, ReLU MLP, digits", "constant, SGD, tanh MLP, digits",
    "ramp, AdamW, ReLU MLP", "constant, AdamW, ReLU MLP", "constant, momentum, ReLU MLP",
    "constant, SGD, batch 8, tanh MLP", "BatchNorm", "characters, batch 32", "characters, batch 8",
)  # fmt: skip
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
    chosen = PROBLEMS[name]
    net = network(chosen)
    x, y = (digits() if chosen.data == "digits" else mnist()).tensors
    if chosen.momentum is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), chosen.lr)
    else:
        optimizer = torch.optim.SGD(net.parameters(), chosen.lr, chosen.momentum)
    return (
        net,
        optimizer,
        lambda step: chosen.schedule(step / STEPS),
        taken(x, y, chosen.batch or len(x)),
        images,
        len(x),
    )


def full(snapshot: Snapshot, probes: ProbeSet, *, simulated: bool = False) -> tuple[float, float]:
    """Courant numbers of the second moment and, on request, of lambda, from collected samples."""
    sgd = frozen_sgd(snapshot, probes)
    draws = batches_of(sgd, replacement=False)
    lr = sgd.lr / mean_square_lr(sgd.modes, tol=1e-4, **draws)
    return lr, sgd.lr / critical_lr(sgd.modes, tol=1e-4, steps=100, **draws).value if simulated else 0.0


def readings(name: str) -> dict[str, list[float]]:
    torch.manual_seed(0)
    net, optimizer, schedule, batches, loss_of, population = problem(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    fixed = {count: Probes(count, None, None) for count in (128, 32)}
    for probes in fixed.values():
        probes.drop(population)
    metrics = {"batch": MeanSquareStability(), "16 rows": MeanSquareStability(16)}
    found: dict[str, list[float]] = {key: [] for key in ("128", "sgd", "32 fixed", *metrics)}
    net.train()
    for step in range(STEPS):
        batch = next(batches)
        measured = step % EVERY == 0 and step > 0
        for probes in fixed.values():
            probes.add(batch)
        if measured:
            pending = PendingStep(net)
            pending.add(batch, loss_of)
        loss = loss_of(net, batch)
        optimizer.zero_grad()
        loss.backward()
        if not bool(loss.isfinite()):
            break
        if measured:
            own = fixed[128].samples_of_step(pending, loss_of)
            snapshot = pending.snapshot(step, optimizer, loss=loss.detach().clone(), samples_of_step=own)
            try:
                of_128 = full(snapshot, fixed[128].probe_set(pending, loss_of), simulated=True)
                row = [*of_128, full(snapshot, fixed[32].probe_set(pending, loss_of))[0]]
                row += [float(m(snapshot)["stability/courant_mean_square"]) for m in metrics.values()]
            except Unmeasurable as error:
                print(f"  step {step}: {error}")
                continue
            for values, value in zip(found.values(), row):
                values.append(value)
        optimizer.step()
        scheduler.step()
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in sys.argv[1:] or NAMES:
        found = readings(name)
        print(f"{name}: {len(found['128'])} readings", flush=True)
        for key, beside in (("batch", "128"), ("batch", "sgd"), ("16 rows", "128"), ("32 fixed", "128")):
            ratio = [a / b for a, b in zip(found[key], found[beside]) if b > 0]
            low, middle, high = quantiles(ratio, n=4)
            print(
                f"  {key} over {beside}: {low:.2f}, {middle:.2f}, {high:.2f}; means {mean(found[key]):.3g} over "
                f"{mean(found[beside]):.3g}; above 1: {sum(v > 1 for v in found[key])} and "
                f"{sum(v > 1 for v in found[beside])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
