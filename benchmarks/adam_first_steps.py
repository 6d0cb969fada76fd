"""Claim: the Courant numbers behind a preconditioner tell healthy runs from failing ones in their first 50 steps.

Four networks on scikit-learn's digits (ReLU and tanh MLPs, a CNN with BatchNorm, a small transformer) under Adam,
AdamW, RMSprop and Adagrad, batch 64; the definition (`coming_rule`) was chosen on seeds 10 to 13. A run is *healthy* if
no loss of its first 50 steps is above 1.1 times the first and it falls to a quarter of that in 400; *failing* if it
does not fall to half of it; otherwise it had a *bad start*. Measured every third step, which asks more of a rule
against false events than a budget does; and once more at the default cadence, which reads such a run once or twice.
Events and stops are those of `StopOnInstability`, which lets training go on here.
``python benchmarks/adam_first_steps.py`` prints the table of ``adam_first_steps.md`` (ten minutes and more); names of
optimizers and seeds ask for a part of it, "BatchNorm" for that CNN too, whose Gram rows take a backward pass each.
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
from runs import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lsp_callbacks import StabilityMonitor, StopOnInstability

SEEDS = (0,)
EVERY, FIRST, STEPS = 3, 50, 400


class Transformer(nn.Module):
    """One block on the eight rows of an image."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x.flatten(1).unflatten(1, (8, 8))) + self.place
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in self.qkv(self.first(z)).chunk(3, -1))
        heads = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
        z = z + self.out(heads.transpose(-3, -2).flatten(-2))
        return self.head((z + self.mlp(self.second(z))).mean(-2))


def relu() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )  # fmt: skip


def tanh() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "ReLU MLP": relu, "tanh MLP": tanh, "CNN, BatchNorm": batch_norm, "transformer": Transformer,
}  # fmt: skip
OPTIMIZERS: dict[str, Any] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}
#: Negative rates are warmed up over 20 steps.
RATES = {
    "Adam": (1e-3, 3e-2, 0.1, 1.0),
    "AdamW": (1e-2, -3e-2, 3.0),
    "RMSprop": (1e-3, 3e-3, 1.0),
    "Adagrad": (1e-2, 3e-2, 10.0),
}


class Classifier(pl.LightningModule):
    def __init__(self, net: str, optimizer: str, lr: float):
        super().__init__()
        self.net, self.kind, self.lr = NETS[net](), OPTIMIZERS[optimizer], lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), lr=abs(self.lr))
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 20) if self.lr < 0 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ramp, "interval": "step"}}


@dataclass(frozen=True)
class Outcome:
    """First reading and largest mean of three of ``courant_gd`` and ``courant_sgd``; event, stops; the losses."""

    readings: tuple[tuple[float, float], ...]
    event: int | None
    stop: int | None
    seldom: int | None
    forecast: bool
    first: float
    most: float
    end: float

    @property
    def population(self) -> str:
        if self.most <= 1.1 * self.first and self.end < 0.25 * self.first:
            return "healthy"
        return "bad start" if self.end < 0.5 * self.first else "failing"


def train(net: str, optimizer: str, lr: float, seed: int, steps: int, callbacks: list[Any]) -> list[float]:
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(digits(), batch_size=64, shuffle=True, drop_last=True)
    model = Classifier(net, optimizer, lr)
    pl.Trainer(
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    ).fit(model, loader)  # fmt: skip
    return model.losses


class Forecasts(StopOnInstability):
    """Notes forecasts, and never stops."""

    def judge(self, *args: Any) -> bool:
        super().judge(*args)
        return False


def run(net: str, optimizer: str, lr: float, seed: int) -> Outcome:
    """One run: 50 steps that are measured every third step, and 400 at the default cadence."""
    monitor = StabilityMonitor(["sharpness", "sgd_stability"], every_n_steps=EVERY)
    watch = Forecasts(verbose=False)
    train(net, optimizer, lr, seed, FIRST, [monitor, watch])
    seldom = Forecasts(verbose=False)
    losses = train(net, optimizer, lr, seed, STEPS, [StabilityMonitor(["sharpness", "sgd_stability"]), seldom])
    readings = []
    for key in ("stability/courant_gd", "stability/courant_sgd"):
        curve = monitor.history[key]
        known = [value for value in curve.values if not math.isnan(value)]
        means = [sum(known[i : i + 3]) / 3 for i in range(len(known) - 2)]
        readings.append((known[0] if known else math.nan, max(means, default=math.nan)))
    return Outcome(
        readings=tuple(readings),
        event=watch.event_step,
        stop=watch.stop_step,
        seldom=seldom.stop_step,
        forecast="stability/steps_to_edge" in monitor.history,
        first=losses[0],
        most=max(losses[:FIRST]),
        end=sum(losses[-20:]) / 20,
    )


def row(name: str, seed: int, outcome: Outcome) -> str:
    cells = [f"{first:.2g} | {largest:.2g}" for first, largest in outcome.readings]
    cells += ["-" if step is None else str(step) for step in (outcome.event, outcome.stop, outcome.seldom)]
    losses = f"{outcome.first:.2g} | {outcome.most:.2g} | {outcome.end:.2g}"
    forecast = "yes" if outcome.forecast else "-"
    return f"| {outcome.population} | {name} | {seed} | {' | '.join(cells)} | {forecast} | {losses} |"


def summary(outcomes: list[Outcome]) -> str:
    lines = []
    for population in ("healthy", "bad start", "failing"):
        own = [o for o in outcomes if o.population == population]
        events, stops, seldom = (sum(getattr(o, what) is not None for o in own) for what in ("event", "stop", "seldom"))
        forecasts = sum(o.forecast for o in own)
        lines.append(
            f"{population}: {len(own)} runs, events {events}, stops {stops}, stops at the default cadence {seldom}, "
            f"forecasts {forecasts}"
        )
    return "\n".join(lines)


def main(names: list[str], seeds: list[int]) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    head = (
        "", "run", "seed", "courant_gd: first", "largest", "courant_sgd: first", "largest", "event", "stop",
        "stop, default cadence", "forecast", "loss: first", "largest of 50", "at 400",
    )  # fmt: skip
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    outcomes = []
    for optimizer in [name for name in names if name in OPTIMIZERS] or OPTIMIZERS:
        for lr in RATES[optimizer]:
            for net in NETS:
                if "BatchNorm" in net and "BatchNorm" not in names:
                    continue
                for seed in seeds:
                    outcomes.append(run(net, optimizer, lr, seed))
                    name = f"{optimizer} {abs(lr):g}{', warm-up' * (lr < 0)}, {net}"
                    print(row(name, seed, outcomes[-1]), flush=True)
    print("", summary(outcomes), sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([a for a in sys.argv[1:] if not a.isdigit()], [int(a) for a in sys.argv[1:] if a.isdigit()] or list(SEEDS))
