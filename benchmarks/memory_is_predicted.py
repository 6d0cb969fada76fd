"""Claim: the extra memory of a measurement is predicted within a factor of two, before it is made.

Each quantity alone, and all default ones together, on an MLP, a CNN and a small transformer, on whose first versions
the constants of the prediction were chosen, and on a second version of each. CPU, while training. *Measured* is the
highest sum of the allocations that torch's profiler sees while the quantity is updated, beside what was there before.
Names of quantities, or "default", choose some.
"""

import logging
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import LyapunovTrajectory, Snapshot, StabilityMonitor, Unmeasurable
from lsp_callbacks.monitor.budget import measurement_memory
from lsp_callbacks.operators.footprint import readable

#: Each by itself, and a preset, which leaves out what a network does not have.
QUANTITIES: tuple[list[str] | str, ...] = (
    ["spectral_norm"], ["residual_cfl"], ["sharpness"], ["sgd_stability"], ["lyapunov"], ["batch_sharpness"],
    ["lyapunov_trajectory"], ["numerics"], "default",
)  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, width: int = 64, length: int = 32, depth: int = 2, activation: str = "gelu"):
        super().__init__()
        self.embed, self.place = nn.Embedding(100, width), nn.Parameter(torch.randn(length, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, activation=activation)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens) + self.place).mean(1))


def problem(name: str) -> tuple[nn.Module, Tensor, int]:
    """Network, inputs of the whole data set, batch size."""
    if name == "MLP":
        layers = [nn.Linear(100, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)]
        return nn.Sequential(*layers), torch.randn(256, 100), 64
    if name == "CNN":
        layers = [
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        ]  # fmt: skip
        return nn.Sequential(*layers), torch.randn(256, 3, 16, 16), 64
    if name == "transformer":
        return Encoder(), torch.randint(100, (256, 32)), 32
    if name == "ReLU MLP":
        layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        return nn.Sequential(*layers), torch.randn(512, 784), 128
    if name == "strided CNN":
        layers = [
            nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 64, 10),
        ]  # fmt: skip
        return nn.Sequential(*layers), torch.randn(256, 3, 32, 32), 128
    return Encoder(128, 48, activation="relu"), torch.randint(100, (256, 48)), 16


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, *, adam: bool):
        super().__init__()
        self.net, self.adam = net, adam

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=3e-4)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def peak(prof: Any) -> int:
    """The highest sum of all allocations so far."""
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compare(name: str, quantities: list[str] | str, *, adam: bool = False) -> tuple[float, int]:
    """Bytes predicted and measured, the most over the steps of one measurement; ``adam``: under AdamW, not SGD."""
    predicted: list[float] = []
    measured: list[int] = []
    long = quantities == ["lyapunov_trajectory"]  # its default window is longer than these runs
    monitor = StabilityMonitor([LyapunovTrajectory(transient=0, window=40)] if long else quantities, every_n_steps=8)
    observe = monitor.monitor.observe

    def profiled(snapshot: Snapshot) -> Any:
        if monitor.monitor.wants(snapshot.step):
            predicted.append(max(measurement_memory(monitor.monitor.quantities, snapshot).values()))
        snapshot.forget()
        vars(snapshot).pop("calls", None), vars(snapshot).pop("flat_gradient", None)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            found = observe(snapshot)
        measured.append(peak(prof))
        return found

    vars(monitor.monitor)["observe"] = profiled
    torch.manual_seed(0)
    net, inputs, batch = problem(name)
    labels = torch.randint(10, (len(inputs),))
    trainer = pl.Trainer(
        max_steps=60 if long else 12, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(Classifier(net, adam=adam), DataLoader(TensorDataset(inputs, labels), batch_size=batch))
    return max(predicted), max(measured)


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for name in ("MLP", "CNN", "transformer", "ReLU MLP", "strided CNN", "ReLU transformer"):
        for quantities in QUANTITIES:
            what = quantities if isinstance(quantities, str) else quantities[0]
            if names and what not in names:
                continue
            try:
                predicted, measured = compare(name, quantities)
            except Unmeasurable as error:
                print(f"{name:16} {what:20} {error}", flush=True)
                continue
            sizes = f"predicted {readable(predicted):>8}, measured {readable(measured):>8}"
            print(f"{name:16} {what:20} {sizes}: {predicted / measured:.2f} times", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
