"""Claim: each quantity's model of its cost is within a factor of two of what a measurement takes, large model or small.

One complete measurement of each quantity, alone, all steps of its window summed, in units of a gradient of the same
replay (forward and backward pass), which is timed in turn with it: by the processor's time, one thread, the median of
several. The first measurement is not among them: later ones start from it. Prints what `Quantity.cost` predicts, what
was measured and the ratio. Random data, SGD without momentum; ``--optimizer`` takes another. A dash
stands where the network has nothing to measure.

``--round`` instead takes the quantities of the default preset on models like those that people train, each with the
optimizer that goes with it: what the first measurement of each takes and the later ones, predicted before each and
measured; then all of them together, started at the same step, whose work they share. ``--whole`` takes whole measured
steps of a training run with Lightning, less as many that are not measured, see ``measured_step.py``. ``--memory`` takes
the growth of the peak of a process, above what it was after its imports, in some steps of training with two
measurements of each, beside that of training alone. ``cost_of_each.md`` has both tables.
"""

import argparse
import itertools
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median

import measured_step
import torch
from models import Block
from torch import Tensor, nn

from lsp_callbacks.errors import NotApplicable, Unmeasurable
from lsp_callbacks.quantities import PRESETS, REGISTRY, Quantity
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.probes import Probes
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.series import Trace
from lsp_callbacks.step.snapshot import Snapshot

CLASSES = 10
#: Seconds after which a measurement is not repeated again.
ENOUGH = 2.0
#: Where a measurement is so many equal steps that some of them tell the rest, or as many as the data ask for.
SETTINGS = {"lyapunov_trajectory": {"transient": 0, "window": 40}, "batch_sharpness": {"rtol": 1e-9, "most": 18}}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}


class Encoder(nn.Module):
    def __init__(self, width: int = 64, length: int = 16):
        super().__init__()
        self.embed, self.place = nn.Embedding(100, width), nn.Parameter(torch.randn(length, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens) + self.place).mean(1))


def mlp(activation: type[nn.Module], *widths: int) -> nn.Module:
    pairs = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*pairs, nn.Linear(widths[-1], CLASSES))


def cnn() -> nn.Module:
    def stage(a: int, b: int, **settings: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, **settings), nn.BatchNorm2d(b), nn.ReLU()]

    stages = [*stage(3, 16), *stage(16, 32, stride=2), *stage(32, 64, stride=2), *stage(64, 64)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.norms[1](self.second(nn.functional.relu(self.norms[0](self.first(x))))))


def residual_cnn() -> nn.Module:
    blocks = [ResidualBlock(48) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, CLASSES)
    )


class Language(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int, heads: int = 4, length: int = 64):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) / 50)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens) + self.place))


class Vision(nn.Module):
    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3):
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, width, 4, stride=4), nn.Parameter(torch.randn(64, width) / 50)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.blocks(self.patches(x).flatten(2).mT + self.place)).mean(1))


def flat(width: int, batch: int) -> Tensor:
    return torch.randn(4 * batch, width)


#: Network, inputs of the whole data set, batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "MLP": (lambda: mlp(nn.Tanh, 64, 256, 256), partial(flat, 64, 64), 64),
    "CNN": (cnn, lambda: torch.randn(256, 3, 16, 16), 64),
    "transformer": (Encoder, lambda: torch.randint(100, (256, 16)), 64),
    "large": (lambda: mlp(nn.Tanh, 512, 736, 736), partial(flat, 512, 256), 256),
    "large, kinks": (lambda: mlp(nn.ReLU, 512, 736, 736), partial(flat, 512, 256), 256),
    "MLP 784": (lambda: mlp(nn.Tanh, 784, 256, 256), partial(flat, 784, 128), 128),
    "residual CNN": (residual_cnn, lambda: torch.randn(256, 3, 16, 16), 64),
    "char transformer": (lambda: Language(96, 128, 2), lambda: torch.randint(96, (128, 64)), 32),
    "ViT": (Vision, lambda: torch.randn(64, 3, 32, 32), 16),
    "GPT": (lambda: Language(8192, 288, 8), lambda: torch.randint(8192, (32, 64)), 8),
}
#: Those of ``--round``, and their optimizers.
ROUND = {"MLP 784": "momentum", "residual CNN": "momentum", "char transformer": "adam", "ViT": "adam", "GPT": "adam"}


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())


def labels(net: nn.Module, x: Tensor) -> Tensor:
    return x.roll(-1, 1) if isinstance(net, Language) else torch.randint(CLASSES, (len(x),))


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def steps(
    model: str, optimizer: str, quantities: Sequence[Quantity], *, timing: bool = True
) -> Iterator[tuple[Snapshot, float]]:
    """Steps of a real run, each before its update, and the seconds of a gradient next to it."""
    torch.manual_seed(0)
    build, inputs, size = MODELS[model]
    net, x = build(), inputs()
    batches = list(zip(x.split(size), labels(net, x).split(size)))
    rule = OPTIMIZERS[optimizer](net.parameters())
    probes = Probes(max((getattr(quantity, "probes", 0) for quantity in quantities), default=0), None, None)
    trace = Trace(max((quantity.recorded for quantity in quantities), default=0) or 1)
    probes.population = len(x)

    def captures(name: str, module: nn.Module) -> bool:
        return any(quantity.captures_inputs(name, module) for quantity in quantities)

    run = RunContext(series=trace, captures_inputs=captures)
    for step in itertools.count():
        batch = batches[step % len(batches)]
        pending = PendingStep(net, run=run)
        probes.add(batch), pending.add(batch, loss_of)
        loss = loss_of(net, batch)
        pending.saw_loss(loss)
        rule.zero_grad()
        loss.backward()
        trace.record(step, loss.detach(), lr=largest_learning_rate(rule), module=net)
        found = probes.probe_set(pending, loss_of) if probes.wanted else None
        own = partial(probes.samples_of_step, pending, loss_of)
        snapshot = pending.snapshot(step, rule, loss=loss.detach().clone(), probes=found, samples_of_step=own)
        loss = pending = own = None
        if (found is None or found.full) and not any(quantity.warm_up(snapshot) for quantity in quantities):
            yield snapshot, timed(partial(replayed_gradient, snapshot)) if timing else 0.0
        rule.step()


@dataclass
class Spent:
    """Gradients of a quantity: of its first measurement and of the median of those after it, predicted and measured."""

    cold: tuple[float, float]
    warm: tuple[float, float]
    milliseconds: float


def measure(quantities: Sequence[Quantity], model: str, optimizer: str, repetitions: int) -> Spent:
    """Measure quantities that are started at the same steps; work that they share is spent once."""
    gradients: list[float] = []
    told: list[float] = []
    took: list[float] = []
    spent, due, began = 0.0, list(quantities), time.process_time()
    for snapshot, gradient in steps(model, optimizer, quantities):
        gradients.append(gradient)
        if len(due) == len(quantities) and not spent:
            told.append(predicted(quantities, replace(snapshot)))  # whose work is not shared with the measurement
        spent += timed(partial(all_of, due, snapshot))
        due = [quantity for quantity in due if not quantity.complete]
        if not due:
            took.append(spent)
            spent, due = 0.0, list(quantities)
            if len(took) > repetitions or (len(took) > 2 and time.process_time() - began > ENOUGH):
                break
    unit = median(gradients)
    return Spent((told[0], took[0] / unit), (median(told[1:]), median(took[1:]) / unit), 1e3 * unit)


def all_of(quantities: Sequence[Quantity], snapshot: Snapshot) -> None:
    for quantity in quantities:
        whole(quantity, snapshot)


def whole(quantity: Quantity, snapshot: Snapshot) -> None:
    quantity.update(snapshot)
    if quantity.complete:
        quantity.compute()


def predicted(quantities: Sequence[Quantity], snapshot: Snapshot) -> float:
    parts: dict[str, float] = {}
    for quantity in quantities:
        parts |= quantity.cost(snapshot)
    return sum(parts.values())


def grown(model: str, optimizer: str, names: Sequence[str], rounds: int = 2) -> float:
    """Megabytes by which the peak of this process grows in steps of training with measurements."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantities = [REGISTRY[name]() for name in names]
    due = list(quantities)
    for snapshot, _ in steps(model, optimizer, quantities, timing=False):
        all_of(due, snapshot)
        due = [quantity for quantity in due if not quantity.complete]
        if not due:
            rounds, due = rounds - 1, list(quantities)
        if rounds <= 0 and snapshot.step >= 4:
            break
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(models: Sequence[str]) -> None:
    print("| model, optimizer | quantity | growth of the peak with it / of training | ratio |")
    print("|---|---|---|---|")
    for model in models:
        training = in_process(model, [])
        for names in (*([name] for name in PRESETS["default"]), PRESETS["default"]):
            if "residual_cfl" in names and model == "MLP 784":
                names = [name for name in names if name != "residual_cfl"]
            if names:
                most, what = in_process(model, names), names[0] if len(names) == 1 else "everything"
                print(f"| {model}, {ROUND[model]} | {what} | {most:.0f} / {training:.0f} MB | {most / training:.2f} |")


def in_process(model: str, names: Sequence[str]) -> float:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--grown", model, *names]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def round_of_everything(models: Sequence[str], repetitions: int) -> None:
    print("| model, optimizer | quantity | first: predicted / measured | later: predicted / measured |")
    print("|---|---|---|---|")
    for model in models:
        optimizer, present = ROUND[model], []
        label = f"{model}, {optimizer}"
        for name in PRESETS["default"]:
            try:
                spent = measure([REGISTRY[name]()], model, optimizer, repetitions)
            except NotApplicable:
                continue
            except Unmeasurable as error:
                print(f"| {label} | {name} | {error} | |", flush=True)
                continue
            present.append(name)
            print(f"| {label} | {name} | {shown(spent.cold)} | {shown(spent.warm)} |", flush=True)
        spent = measure([REGISTRY[name]() for name in present], model, optimizer, repetitions)
        print(f"| {label} | **one round of everything** | {shown(spent.cold)} | {shown(spent.warm)} |", flush=True)


def shown(pair: tuple[float, float]) -> str:
    told, took = pair
    return f"{told:.1f} / {took:.1f} = {told / took:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantities", nargs="*", metavar="QUANTITY", help=f"all of {', '.join(REGISTRY)}")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--repetitions", type=int, default=5, help="at most")
    parser.add_argument("--round", action="store_true", help="of the default preset, on the models of the table")
    parser.add_argument("--whole", action="store_true", help="whole measured steps of the MLP, by optimizer")
    parser.add_argument("--memory", action="store_true", help="of the same, as growth of the peak of a process")
    parser.add_argument("--grown", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.grown:
        print(grown(options.grown, ROUND[options.grown], options.quantities))
        return
    if options.whole:
        measured_step.table(options.quantities or measured_step.QUANTITIES, "MLP", list(measured_step.OPTIMIZERS))
        return
    if options.memory:
        memory(options.models or list(ROUND))
        return
    if options.round:
        round_of_everything(options.models or list(ROUND), options.repetitions)
        return
    models = options.models or list(MODELS)[:5]
    print(f"{'predicted / measured, in gradients':34}" + "".join(f"{name:>24}" for name in models))
    units: dict[str, float] = {}
    for name in options.quantities or REGISTRY:
        print(f"{name:34}", end="", flush=True)
        for model in models:
            try:
                spent = measure(
                    [REGISTRY[name](**SETTINGS.get(name, {}))], model, options.optimizer, options.repetitions
                )
                units[model] = spent.milliseconds
                text = shown(spent.warm)
            except NotApplicable:
                text = "-"
            print(f"{text:>24}", end="", flush=True)
        print()
    print(f"{'milliseconds of a gradient':34}" + "".join(f"{units.get(name, math.nan):24.2f}" for name in models))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
