"""Question: how many files does a number enter, and how often does it change from one to the other?

Counts, with `sys.setprofile`, what one training step that completes a measurement enters of this package, from
Lightning's first hook to its last: files, calls, and changes of file, where a call is of a function in another file
than the call before. A small network (two linear layers, a batch of 64) is trained; the last measured step of the run
is shown, when checks that are made once a run are over. *Ways* are changes of file that differ in the function that
calls before, or that is called: products of the same kind go the same way.

Usage:
    python benchmarks/path_of_a_number.py [--where]

Before the files were laid out in folders of five topics it printed

| number | files entered | calls | changes of file | ways |
|---|---|---|---|---|
| sharpness | 31 | 1,472 | 401 | 195 |
| sgd_stability | 38 | 1,651 | 344 | 254 |
| stability_profile | 48 | 113,330 | 32,132 | 418 |

and now

| number | files entered | calls | changes of file | before, in and after `update` | ways |
|---|---|---|---|---|---|
| sharpness | 52 | 998 | 197 | 71 + 78 + 48 | 183 |
| mean_square_stability | 59 | 533 | 172 | 101 + 25 + 46 | 167 |
| sgd_stability | 61 | 1,779 | 214 | 60 + 108 + 46 | 205 |
| stability_profile | 83 | 57,560 | 10,235 | 59 + 10,137 + 39 | 446 |

Small files of one idea each and few changes of file work against each other. Half of the first numbers was asked: 200,
172 and 172; `sgd_stability` is not there. Half of what it makes are before and after its `update`, the same for every
quantity that is measured on a copy of the step: whether it is due and can be paid, the copy, its fingerprint, the
guards of a replay; the Courant number, history, checks of gradient and update, the look-ahead, the log. Of those in its
`update` a fifth checks that a replay has the step's loss and gradient. A quarter is a pass over the probes as a step
makes it (module, carried state, random state, batch, side effects, modes, and back), with some for each layer, where
the search for the criterion and the guard against the original module look on. The others are the optimizer's rule, the
curvature of the outputs, the Gram matrix with the backward pass that checks it, and three numbers from that: the edge
of the second moment, the rate at which the exponent turns positive, looked for twice, and the exponent. `--where` shows
them.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lsp_callbacks
from lsp_callbacks import StabilityMonitor

PACKAGE = str(Path(lsp_callbacks.__file__).parent)
STEPS = {"sharpness": 6, "mean_square_stability": 6, "sgd_stability": 6, "stability_profile": 40}


class Trace:
    """The calls of functions of this package, in their order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            self.calls.append(
                (file.removeprefix(PACKAGE + "/"), getattr(frame.f_code, "co_qualname", frame.f_code.co_name))
            )

    def parts(self) -> tuple[int, int, int]:
        """Return how many changes of file there are before the quantity's ``update``, in it, and after it."""
        of_quantities = [(k, name.split(".")[-1]) for k, (file, name) in enumerate(self.calls) if "quantities/" in file]
        begin = next(k for k, name in of_quantities if name == "update")
        end = max(k for k, name in of_quantities if name == "finish")
        places = [k for k, (a, b) in enumerate(zip(self.calls, self.calls[1:]), 1) if a[0] != b[0]]
        before, until = sum(k <= begin for k in places), sum(k <= end for k in places)
        return before, until - before, len(places) - until

    @property
    def changes(self) -> Counter:
        """How often each change of file was made."""
        return Counter((a, b) for a, b in zip(self.calls, self.calls[1:]) if a[0] != b[0])


class Begin(pl.Callback):
    """Stands before the monitor."""

    def __init__(self, monitor: StabilityMonitor):
        self.monitor, self.trace, self.points = monitor, Trace(), 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.trace, self.points = Trace(), points(self.monitor)
        sys.setprofile(self.trace)


class End(pl.Callback):
    """Stands behind the monitor, and keeps the steps that completed a measurement."""

    def __init__(self, begin: Begin):
        self.begin, self.measured = begin, []

    def on_train_batch_end(self, *_: Any) -> None:
        sys.setprofile(None)
        if points(self.begin.monitor) > self.begin.points:
            self.measured.append(self.begin.trace)


def points(monitor: StabilityMonitor) -> int:
    """Return how many values all curves have."""
    return sum(len(curve.values) for curve in monitor.history.values())


class Net(pl.LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def last_measured(name: str) -> Trace:
    """Return the calls of the last step of a run that completed a measurement of one quantity."""
    torch.manual_seed(0)
    monitor = StabilityMonitor([name], every_n_steps=1)
    begin = Begin(monitor)
    end = End(begin)
    x, y = torch.randn(256, 10), torch.randint(3, (256,))
    trainer = pl.Trainer(
        max_steps=STEPS[name], callbacks=[begin, monitor, end], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(TensorDataset(x, y), batch_size=64))
    return end.measured[-1]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print("| number | files entered | calls | changes of file | before, in and after `update` | ways |")
    print("|---|---|---|---|---|---|")
    for name in STEPS:
        trace = last_measured(name)
        files, changes = {file for file, _ in trace.calls}, trace.changes
        parts = " + ".join(f"{part:,}" for part in trace.parts())
        print(f"| {name} | {len(files)} | {len(trace.calls):,} | {changes.total():,} | {parts} | {len(changes)} |")
        for (a, b), count in changes.most_common(40) if "--where" in sys.argv else ():
            print(f"    {count} {':'.join(a)} -> {':'.join(b)}")
