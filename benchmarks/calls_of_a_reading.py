"""Question: which part of a headline reading makes how many calls, and takes how many gradients?

An MLP 784-256-256-10 on random data, batch 128, SGD with momentum (``adam``: AdamW, after 100 steps), under Lightning
with a logger. `StabilityMonitor` reads `MeanSquareStability` at every fourth step; eight readings are counted after the
first checks, with the step after each, at whose beginning there may be something left to do. A *call* is one of a
function that is written in Python, whosever it is, by `sys.setprofile`, from the first of Lightning's hooks of ours to
the last, less those of two other steps. A gradient is the processor's time of a forward and a backward pass, one
thread. The whole is the difference of the medians, timed without the profiler, whose share of each part divides it up.

    python benchmarks/calls_of_a_reading.py [adam]
"""

import gc
import logging
import sys
import time
import warnings
from collections import Counter
from statistics import median

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor

#: By the file and the name of the function that begins it; everything that it calls belongs to it, up to the next one.
PARTS = {
    ("stability_monitor.py", "on_train_batch_start"): "hooks around it",
    ("stability_monitor.py", "on_before_backward"): "hooks around it",
    ("stability_monitor.py", "on_before_optimizer_step"): "hooks around it",
    ("stability_monitor.py", "on_train_batch_end"): "hooks around it",
    ("pending_step.py", "add"): "keeping the step",
    ("pending_step.py", "snapshot"): "keeping the step",
    ("lightning_loop.py", "new_step"): "keeping the step",
    ("update_check.py", "expect"): "check of the update",
    ("update_check.py", "missed"): "check of the update",
    ("gradient_check.py", "expect"): "check of the update",
    ("gradient_check.py", "is_changed"): "check of the update",
    ("monitor.py", "observe"): "choosing and keeping numbers",
    ("publisher.py", "publish"): "publishing",
    ("lr_forecast.py", "look_ahead"): "publishing",
    ("mean_square_stability.py", "update"): "rows and their products",
    ("frozen_preconditioner.py", "frozen_rule"): "the optimizer's rule",
    ("frozen_sgd.py", "mean_square_lr"): "critical rate",
    ("output_rows.py", "softmax_rows"): "rows of the outputs",
    ("step_samples.py", "sampled_rows"): "choice of rows",
    ("collapsed_outputs.py", "add"): "equal outputs",
    ("collapsed_outputs.py", "share"): "equal outputs",
}
READ, FIRST, LAST = 4, 40, 72
BATCH = 128


class Net(pl.LightningModule):
    def __init__(self, optimizer: str):
        super().__init__()
        widths = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        self.net, self.optimizer = nn.Sequential(*widths), optimizer

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Parts:
    """Calls and time by part, as a profile function."""

    def __init__(self) -> None:
        self.calls: Counter = Counter()
        self.time: Counter = Counter()
        self._labels: list[str] = []
        self._began: list[int] = []
        self._depth, self._since = 0, 0

    def __call__(self, frame, event, argument) -> None:
        if event == "call":
            self._depth += 1
            code = frame.f_code
            label = PARTS.get((code.co_filename.rsplit("/", 1)[-1], code.co_name))
            if label is not None and ("lsp_callbacks" in code.co_filename):
                self._close()
                self._labels.append(label)
                self._began.append(self._depth)
            if self._labels:
                self.calls[self._labels[-1]] += 1
        elif event == "return":
            if self._began and self._began[-1] == self._depth:
                self._close()
                self._labels.pop()
                self._began.pop()
            self._depth -= 1

    def _close(self) -> None:
        now = time.process_time_ns()
        if self._labels:
            self.time[self._labels[-1]] += now - self._since
        self._since = now


class Steps(pl.Callback):
    """Stands before the monitor and behind it."""

    def __init__(self, first: int, parts: list[Parts] | None):
        self.first, self.parts = first, parts
        self.times: list[list[float]] = [[], [], []]  # of steps that are read, of those after them, of others

    def on_train_batch_start(self, trainer, *_) -> None:
        step = trainer.global_step
        self._kind = min(step % READ, 2)
        gc.disable()
        self._began = time.process_time()
        if self.parts is not None and step >= self.first:
            sys.setprofile(self.parts[self._kind])

    def end(self, step: int) -> None:
        sys.setprofile(None)
        gc.enable()
        if step >= self.first:
            self.times[self._kind].append(time.process_time() - self._began)


class End(pl.Callback):
    def __init__(self, steps: Steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_) -> None:
        self.steps.end(trainer.global_step - 1)


class Logger(DummyLogger):
    def log_metrics(self, metrics, step=None):
        self.last = metrics


def trained(optimizer: str, parts: list[Parts] | None) -> tuple[Steps, Net]:
    """Train with the profiler, or without."""
    torch.manual_seed(0)
    first = FIRST + (100 if optimizer == "adam" else 0)
    steps, net = Steps(first, parts), Net(optimizer)
    data = TensorDataset(torch.randn(2560, 784), torch.randint(0, 10, (2560,)))
    monitor = StabilityMonitor("mean_square_stability", every_n_steps=READ)
    pl.Trainer(
        max_steps=first + LAST - FIRST, callbacks=[steps, monitor, End(steps)], logger=Logger(), accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**6,
    ).fit(net, DataLoader(data, BATCH, shuffle=True))  # fmt: skip
    return steps, net


def gradient(net: Net) -> float:
    """Seconds of a forward and a backward pass."""
    x, y, times = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,)), []
    for _ in range(30):
        began = time.process_time()
        net.zero_grad()
        net.training_step((x, y), 0).backward()
        times.append(time.process_time() - began)
    return median(times)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optimizer = "adam" if "adam" in sys.argv[1:] else "momentum"
    steps, net = trained(optimizer, None)
    read, after, other = map(median, steps.times)
    whole = (read + after - 2 * other) / gradient(net)
    parts = [Parts(), Parts(), Parts()]
    counts = [len(times) for times in trained(optimizer, parts)[0].times]
    weights = [1 / counts[0], 1 / counts[1], -2 / counts[2]]
    calls = {part: sum(w * p.calls[part] for w, p in zip(weights, parts)) for part in parts[0].calls}
    spent = {part: sum(w * p.time[part] for w, p in zip(weights, parts)) for part in parts[0].calls}
    total = sum(spent.values())
    print(f"{optimizer}: {sum(calls.values()):,.0f} calls and {whole:.2f} gradients a reading\n")
    print("| part | calls | gradients |\n|---|---|---|")
    for part in sorted(calls, key=lambda part: -calls[part]):
        print(f"| {part} | {calls[part]:,.0f} | {whole * spent[part] / total:.2f} |")


if __name__ == "__main__":
    main()
