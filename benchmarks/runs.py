"""Runs that fail and healthy ones that look alarming, on scikit-learn's digits, on MNIST, and on a text."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import fetch_openml, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

# -- data ----------------------------------------------------------------------------------------------------------


@cache
def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))


@cache
def mnist(samples: int = 4000) -> TensorDataset:
    """The first images of MNIST's test file, from the folder ``$MNIST`` if that is set, otherwise from OpenML."""
    if "MNIST" in os.environ:
        folder = Path(os.environ["MNIST"])
        names = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
        raw = [gzip.decompress((folder / name).read_bytes()) for name in names]
        images, labels = (np.frombuffer(file, np.uint8, offset=skip) for file, skip in zip(raw, (16, 8)))
    else:
        images, labels = fetch_openml("mnist_784", version=1, as_frame=False, return_X_y=True)
        images, labels = images[60000:], labels[60000:].astype(int)
    x = torch.tensor(np.asarray(images, dtype=np.float32).reshape(-1, 1, 28, 28)[:samples] / 255)
    return TensorDataset((x - 0.13) / 0.31, torch.tensor(np.asarray(labels[:samples], dtype=np.int64)))


#: Characters of the text: few, so that a small transformer learns them by heart, as its loss has to fall.
CHARACTERS, CONTEXT = 1000, 32


@cache
def text() -> TensorDataset:
    """All windows of the first characters of ``tinyshakespeare.txt`` in the folder ``$MNIST``, and what follows."""
    letters = (Path(os.environ["MNIST"]) / "tinyshakespeare.txt").read_text()[: CHARACTERS + 1]
    codes = torch.tensor([sorted(set(letters)).index(letter) for letter in letters])
    return TensorDataset(codes[:-1].unfold(0, CONTEXT, 1), codes[1:].unfold(0, CONTEXT, 1))


DATA: dict[str, Callable[[], TensorDataset]] = {"digits": digits, "mnist": mnist, "text": text}


@cache
def chance(data: str, squared: bool = False) -> float:
    """The loss of the best constant prediction: entropy of the labels' frequencies, or variance of the targets."""
    share = torch.bincount(DATA[data]().tensors[1].flatten()).double()
    share = share / share.sum()
    return float((share * (1 - share)).mean() if squared else torch.special.entr(share).sum())


# -- schedules: the factor of the rate, from the share of the run that is over ----------------------------------------


def constant(at: float) -> float:
    return 1.0


def ramp(at: float) -> float:
    return 300.0**at


def jump(at: float) -> float:
    return 60.0 if at >= 7 / 15 else 1.0


def cosine(at: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * at))


def warmup(at: float) -> float:
    return min(1.0, 5 * at + 0.003)


def decay(at: float) -> float:
    return 0.1 ** int(3 * at)


def restarts(at: float) -> float:
    """Cosine annealing with warm restarts: the rate jumps up by a factor of 100 three times."""
    return 0.01 + 0.495 * (1 + math.cos(math.pi * (3 * at % 1)))


def triangle(at: float) -> float:
    """One cycle, as in one-cycle training: up ten-fold and down again."""
    return 0.1 + 0.9 * (1 - abs(at - 0.5) / 0.5)


def one_cycle(at: float) -> float:
    """From a tenth up to 1 at 30 % of the run, then down as a cosine."""
    return 0.1 + 3 * at if at < 0.3 else 0.5 * (1 + math.cos(math.pi * (at - 0.3) / 0.7))


# -- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One training run.

    Attributes:
        net: of `NETS`.
        activation: of the hidden layers.
        lr: before the schedule.
        momentum: of SGD; None is AdamW.
        batch: None is full batch.
        schedule: the factor of the rate.
        squared: squared loss instead of cross-entropy.
        data: of `DATA`.
        steps: of the run.
        decay: of the weights.
        gain: of the initial weights, beside PyTorch's own.
        corrupt: by what the inputs of one batch, after 40 % of the run, are multiplied.
    """

    net: str
    activation: type[nn.Module]
    lr: float
    momentum: float | None = 0.0
    batch: int | None = 32
    schedule: Callable[[float], float] = constant
    squared: bool = False
    data: str = "mnist"
    steps: int = 1500
    decay: float = 0.0
    gain: float = 1.0
    corrupt: float | None = None


T, R = nn.Tanh, nn.ReLU
CLASSIC = {
    "ramp, SGD, tanh MLP, squared loss": Problem("mlp", T, 0.2, batch=64, schedule=ramp, squared=True, data="digits"),
    "ramp, SGD, tanh MLP, digits": Problem("mlp", T, 0.05, schedule=ramp, data="digits"),
    "ramp, SGD, ReLU MLP, digits": Problem("mlp", R, 0.05, schedule=ramp, data="digits"),
    "ramp, SGD, ReLU MLP": Problem("mlp", R, 0.01, schedule=ramp),
    "ramp, SGD, ReLU CNN": Problem("cnn", R, 0.01, schedule=ramp),
    "ramp, SGD, batch 8, tanh MLP": Problem("mlp", T, 0.005, batch=8, schedule=ramp),
    "ramp, momentum, tanh MLP": Problem("mlp", T, 0.001, 0.9, schedule=ramp),
    "ramp, momentum, ReLU MLP": Problem("mlp", R, 0.001, 0.9, schedule=ramp),
    "ramp, momentum, ReLU CNN": Problem("cnn", R, 0.001, 0.9, schedule=ramp),
    "ramp, momentum, ReLU MLP, digits": Problem("mlp", R, 0.005, 0.9, schedule=ramp, data="digits"),
    "ramp, AdamW, ReLU MLP": Problem("mlp", R, 0.0005, None, schedule=ramp),
    "ramp, AdamW, ReLU CNN": Problem("cnn", R, 0.0005, None, schedule=ramp),
    "jump, SGD, ReLU MLP": Problem("mlp", R, 0.03, schedule=jump),
    "jump, momentum, ReLU CNN": Problem("cnn", R, 0.005, 0.9, schedule=jump),
    "jump, AdamW, tanh MLP": Problem("mlp", T, 0.002, None, schedule=jump),
    "constant, SGD, tanh MLP, digits": Problem("mlp", T, 0.1, data="digits"),
    "constant, SGD, ReLU MLP": Problem("mlp", R, 0.05),
    "constant, SGD, ReLU CNN": Problem("cnn", R, 0.05),
    "constant, SGD, batch 4, ReLU MLP": Problem("mlp", R, 0.01, batch=4),
    "constant, SGD, batch 8, tanh MLP": Problem("mlp", T, 0.03, batch=8),
    "constant, momentum, ReLU MLP": Problem("mlp", R, 0.01, 0.9),
    "constant, momentum, 3 x higher, tanh MLP": Problem("mlp", T, 0.02, 0.9),
    "constant, momentum, ReLU CNN": Problem("cnn", R, 0.01, 0.9),
    "constant, AdamW, ReLU MLP": Problem("mlp", R, 0.001, None),
    "constant, AdamW, ReLU CNN": Problem("cnn", R, 0.002, None),
    "cosine, momentum, ReLU MLP": Problem("mlp", R, 0.02, 0.9, schedule=cosine),
    "warm-up, SGD, ReLU MLP": Problem("mlp", R, 0.1, schedule=warmup),
    "warm-up, AdamW, tanh MLP": Problem("mlp", T, 0.003, None, schedule=warmup),
    "one cycle, momentum, ReLU CNN": Problem("cnn", R, 0.02, 0.9, schedule=triangle),
    "warm restarts, momentum, ReLU MLP": Problem("mlp", R, 0.02, 0.9, schedule=restarts),
    "step decay, SGD, tanh MLP": Problem("mlp", T, 0.1, schedule=decay),
    "full-batch GD at the edge, tanh MLP, squared loss": Problem(
        "mlp", T, 2.0, batch=None, squared=True, data="digits"
    ),
}


def short(net: str, activation: type[nn.Module], lr: float, momentum: float | None = 0.0, **settings: Any) -> Problem:
    """A run of 400 steps on digits, unless it is said otherwise."""
    return Problem(net, activation, lr, momentum, **{"steps": 400, "data": "digits", "batch": 64} | settings)


def words(lr: float, **settings: Any) -> Problem:
    """AdamW on a transformer that predicts characters."""
    return Problem(
        "transformer", nn.GELU, lr, None, **{"steps": 600, "data": "text", "batch": 16, "decay": 0.01} | settings
    )


#: The rate is far beyond the edge from the first step on, or the run comes back from an explosion.
TOO_HIGH = {
    "too high, SGD 3, tanh MLP": short("mlp", T, 3.0),
    "too high, SGD 10, tanh MLP": short("mlp", T, 10.0),
    "too high, SGD 10, ReLU MLP": short("mlp", R, 10.0),
    "too high, SGD 10, tanh MLP, squared loss": short("mlp", T, 10.0, squared=True),
    "too high, momentum, 3, tanh MLP": short("mlp", T, 3.0, 0.9),
    "too high, momentum, 10, ReLU MLP": short("mlp", R, 10.0, 0.9),
    "too high, SGD 10, ReLU MLP, MNIST": short("mlp", R, 10.0, batch=32, data="mnist"),
    "too high, SGD 10, ReLU CNN, MNIST": short("cnn", R, 10.0, batch=32, data="mnist"),
    "too high, AdamW 3, ReLU MLP": short("mlp", R, 3.0, None),
    "too high, AdamW 3, tanh MLP": short("mlp", T, 3.0, None),
    "too high, AdamW 1, transformer": words(1.0, steps=400),
    "too high, SGD 10, BatchNorm MLP": short("bn mlp", R, 10.0, batch=32),
    "too high, momentum, 2, BatchNorm CNN": short("bn cnn", R, 2.0, 0.9, batch=32),
    "too high, momentum, 2, BatchNorm residual CNN": short("bn residual", R, 2.0, 0.9, batch=32),
    "comes back, SGD 1, tanh MLP": short("mlp", T, 1.0),
    "comes back, SGD 0.5, ReLU MLP": short("mlp", R, 0.5),
    "comes back, AdamW 0.03, ReLU MLP": short("mlp", R, 0.03, None),
}
TRANSFORMERS = {
    "ramp, AdamW, transformer": words(0.001, schedule=ramp, steps=1000),
    "ramp, AdamW, transformer, decay 0.1": words(0.002, schedule=ramp, steps=1000, decay=0.1),
    "jump, AdamW, transformer": words(0.003, schedule=jump),
    "short warm-up, AdamW 0.3, transformer": words(0.3, schedule=warmup),
    "short warm-up, AdamW 0.1, transformer": words(0.1, schedule=warmup),
    "constant, AdamW, transformer": words(0.002),
    "constant, AdamW 0.005, transformer": words(0.005),
    "warm-up, AdamW, transformer": words(0.01, schedule=warmup),
    "cosine, AdamW, transformer": words(0.005, schedule=cosine),
    "one cycle, AdamW, transformer": words(0.01, schedule=one_cycle),
}
BATCH_NORM = {
    f"{name}, BatchNorm {net}": short(f"bn {net.split()[0].lower()}", R, lr, momentum, batch=32, **settings)
    for name, (lr, momentum, settings) in {
        "ramp, SGD": (0.1, 0.0, {"schedule": ramp, "steps": 800}),
        "ramp, momentum, decay 5e-4": (0.02, 0.9, {"schedule": ramp, "steps": 800, "decay": 5e-4}),
        "ramp, AdamW, decay 0.1": (0.02, None, {"schedule": ramp, "steps": 800, "decay": 0.1}),
        "constant, SGD": (0.1, 0.0, {}),
        "constant, SGD, 5 x higher, decay 5e-4": (0.5, 0.0, {"decay": 5e-4}),
        "warm-up, momentum": (0.1, 0.9, {"schedule": warmup}),
        "one cycle, momentum, decay 5e-4": (0.3, 0.9, {"schedule": one_cycle, "decay": 5e-4}),
        "constant, AdamW": (0.003, None, {}),
        "one cycle, AdamW, decay 0.1": (0.02, None, {"schedule": one_cycle, "decay": 0.1}),
    }.items()
    for net in ("MLP", "CNN", "residual CNN")
}
#: What else goes wrong, beside the rate; and what looks as if it did.
OTHERS = {
    "bad initialisation, 8 x, SGD, tanh MLP": short("mlp", T, 0.3, gain=8.0),
    "bad initialisation, 8 x, SGD, ReLU MLP": short("mlp", R, 0.1, gain=8.0),
    "bad initialisation, 5 x, momentum, ReLU CNN": short("cnn", R, 0.05, 0.9, gain=5.0),
    "bad initialisation, 6 x, AdamW, transformer": words(0.01, gain=6.0, steps=400),
    "bad initialisation, 0.01 x, SGD, ReLU MLP": short("mlp", R, 0.05, gain=0.01),
    "corrupted batch, 1000 x, SGD, ReLU MLP": short("mlp", R, 0.1, corrupt=1000.0),
    "corrupted batch, 30 x, momentum, ReLU CNN": short("cnn", R, 0.02, 0.9, corrupt=30.0),
    "corrupted batch, 1000 x, AdamW, ReLU MLP": short("mlp", R, 0.002, None, corrupt=1000.0),
    "corrupted batch, 30 x, SGD, tanh MLP": short("mlp", T, 0.3, corrupt=30.0),
    "corrupted batch, NaN, AdamW, ReLU MLP": short("mlp", R, 0.002, None, corrupt=math.nan),
    "collapse, decay 0.5, SGD, ReLU MLP": short("mlp", R, 0.1, decay=0.5),
    "collapse, decay 90, AdamW, tanh MLP": short("mlp", T, 0.01, None, decay=90.0),
    "collapse, jump, SGD, ReLU CNN": short("cnn", R, 0.1, schedule=jump, steps=800),
    "warm-up, AdamW 0.03, ReLU MLP": short("mlp", R, 0.03, None, schedule=warmup),
    "constant, RMS-like AdamW 0.01, tanh MLP": short("mlp", T, 0.01, None),
    "constant, SGD 0.3, tanh MLP, digits": short("mlp", T, 0.3),
}
PROBLEMS = CLASSIC | TOO_HIGH | TRANSFORMERS | BATCH_NORM | OTHERS

# -- networks --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.first(x)).relu()
        return (x + self.norms[1](self.second(inner))).relu()


class Attention(nn.Module):
    """Two layers' worth of a transformer: attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    def __init__(self, characters: int, width: int = 32, layers: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        place = self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.embed(x) + place)))


def network(problem: Problem) -> nn.Module:
    act, size = problem.activation, 8 if problem.data == "digits" else 28
    if problem.net == "transformer":
        return Transformer(int(text().tensors[0].max()) + 1)
    if problem.net == "mlp":
        layers = [nn.Flatten(), nn.Linear(size**2, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)
    if problem.net == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2), act(), nn.Conv2d(8, 16, 3, padding=1), act(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * (size // 4) ** 2, 10),
        )  # fmt: skip
    if problem.net == "bn mlp":
        hidden = [[nn.Linear(a, 32), nn.BatchNorm1d(32), act()] for a in (64, 32)]
        return nn.Sequential(nn.Flatten(), *hidden[0], *hidden[1], nn.Linear(32, 10))
    first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    if problem.net == "bn cnn":
        body = [nn.BatchNorm2d(8), act(), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), act()]
    else:
        body = [Block(8), Block(8)]
    width = 64 if problem.net == "bn cnn" else 32
    return nn.Sequential(first, *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width, 10))


class Classifier(pl.LightningModule):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem, self.net = problem, network(problem)
        with torch.no_grad():
            for p in self.net.parameters():
                if p.ndim > 1:
                    p.mul_(problem.gain)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.problem.corrupt is not None and self.global_step == int(0.4 * self.problem.steps):
            x = self.problem.corrupt * x
        outputs = self.net(x)
        if self.problem.squared:
            return F.mse_loss(outputs, F.one_hot(y, 10).float())
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())

    def configure_optimizers(self) -> Any:
        problem = self.problem
        optimizer: torch.optim.Optimizer
        if problem.momentum is None:
            optimizer = torch.optim.AdamW(self.parameters(), problem.lr, weight_decay=problem.decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), problem.lr, problem.momentum, weight_decay=problem.decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: problem.schedule(step / problem.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Losses(pl.Callback):
    """The loss, the rate and the norm of the gradient of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def fit(problem: Problem, seed: int, callbacks: list[Any]) -> Losses:
    """Trains once."""
    pl.seed_everything(seed, verbose=False)
    data = DATA[problem.data]()
    loader = DataLoader(data, batch_size=problem.batch or len(data), shuffle=True)
    losses = Losses()
    trainer = pl.Trainer(
        max_steps=problem.steps, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, losses],
    )  # fmt: skip
    trainer.fit(Classifier(problem), loader)
    return losses
