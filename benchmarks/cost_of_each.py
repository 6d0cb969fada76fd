"""Claim: each quantity's model of its cost is within a factor of two of what a measurement takes, large model or small.

One complete measurement of each quantity, alone, all steps of its window summed, in units of a gradient of the same
replay (forward and backward pass), which is timed in turn with it: by the processor's time, one thread, the median of
several. The first measurement is not among them: later ones start from it. Prints what `Quantity.cost` predicts, what
was measured and the ratio. Random data, SGD without momentum; ``--optimizer`` takes another. A dash
stands where the network has nothing to measure.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from lsp_callbacks.errors import NotApplicable
from lsp_callbacks.quantities import REGISTRY, Quantity
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


def flat(width: int, batch: int) -> Tensor:
    return torch.randn(4 * batch, width)


#: Network, inputs of the whole data set, batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "MLP": (lambda: mlp(nn.Tanh, 64, 256, 256), partial(flat, 64, 64), 64),
    "CNN": (cnn, lambda: torch.randn(256, 3, 16, 16), 64),
    "transformer": (Encoder, lambda: torch.randint(100, (256, 16)), 64),
    "large": (lambda: mlp(nn.Tanh, 512, 736, 736), partial(flat, 512, 256), 256),
    "large, kinks": (lambda: mlp(nn.ReLU, 512, 736, 736), partial(flat, 512, 256), 256),
}


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(quantity: Quantity, model: str, optimizer: str, repetitions: int) -> tuple[float, float, float]:
    """Gradients predicted and measured, and milliseconds of a gradient."""
    torch.manual_seed(0)
    build, inputs, size = MODELS[model]
    net, x = build(), inputs()
    batches = list(zip(x.split(size), torch.randint(CLASSES, (len(x),)).split(size)))
    rule = OPTIMIZERS[optimizer](net.parameters())
    probes, trace = Probes(getattr(quantity, "probes", 0), None, None), Trace(max(quantity.recorded, 1))
    probes.population = len(x)
    gradients: list[float] = []
    measured: list[float] = []
    spent, step, last, began = 0.0, 0, math.nan, time.process_time()
    while len(measured) < 2 or (len(measured) <= repetitions and time.process_time() - began < ENOUGH):
        batch = batches[step % len(batches)]
        pending = PendingStep(net, run=RunContext(series=trace, captures_inputs=quantity.captures_inputs))
        probes.add(batch), pending.add(batch, loss_of)
        loss = loss_of(net, batch)
        rule.zero_grad()
        loss.backward()
        trace.record(step, loss.detach(), lr=largest_learning_rate(rule), module=net)
        found = probes.probe_set(pending, loss_of) if probes.wanted else None
        own = probes.samples_of_step(pending, loss_of)
        snapshot = pending.snapshot(step, rule, loss=loss.detach().clone(), probes=found, samples_of_step=own)
        if (found is None or found.full) and not quantity.warm_up(snapshot):
            # Before each step, so that both see the same machine; few of a long window are enough.
            if len(gradients) < 400:
                gradients.append(timed(partial(replayed_gradient, snapshot)))
            spent += timed(partial(whole, quantity, snapshot))
            if quantity.complete:
                measured.append(spent)
                spent, last = 0.0, predicted(quantity, snapshot)
        rule.step()
        step += 1
    unit = median(gradients)
    return last, median(measured[1:]) / unit, 1e3 * unit


def whole(quantity: Quantity, snapshot: Snapshot) -> None:
    quantity.update(snapshot)
    if quantity.complete:
        quantity.compute()


def predicted(quantity: Quantity, snapshot: Snapshot) -> float:
    return sum(quantity.cost(snapshot).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantities", nargs="*", metavar="QUANTITY", help=f"all of {', '.join(REGISTRY)}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--repetitions", type=int, default=5, help="at most")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{'predicted / measured, in gradients':34}" + "".join(f"{name:>24}" for name in options.models))
    units: dict[str, float] = {}
    for name in options.quantities or REGISTRY:
        print(f"{name:34}", end="", flush=True)
        for model in options.models:
            quantity = REGISTRY[name](**SETTINGS.get(name, {}))
            try:
                told, took, units[model] = measure(quantity, model, options.optimizer, options.repetitions)
                shown = f"{told:.1f} / {took:.1f} = {told / took:.2f}"
            except NotApplicable:
                shown = "-"
            print(f"{shown:>24}", end="", flush=True)
        print()
    print(
        f"{'milliseconds of a gradient':34}" + "".join(f"{units.get(name, math.nan):24.2f}" for name in options.models)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
