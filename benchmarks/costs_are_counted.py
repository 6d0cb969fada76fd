"""Claim: what a quantity says that its next measurement costs is within a factor of 1.5 of what is then counted.

Each default quantity alone, on networks like those that people train, GPT-2 with a vocabulary of 8192 included: its
first measurement and a later one, which starts from that before. Counted are operations, numbers in their results,
multiplications and calls of functions, all steps of a window together and what follows an update, each by a fixed
number of nanoseconds, over those of one forward and backward pass of the same step: no clock. Prints what was said,
what was counted, and the ratio. Names of networks choose some; ``--quantities`` names others.
"""

import argparse
import logging
import sys
import warnings
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from models import TRAININGS, Training
from torch._library.simple_registry import find_torch_dispatch_rule

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.monitor.budget import LIMIT
from lsp_callbacks.operators.cost import MULTIPLICATION, Work, WorkCounter, assume, work
from lsp_callbacks.quantities import PRESETS, Quantity
from lsp_callbacks.step.snapshot import Snapshot

#: Nanoseconds of an operation as PyTorch dispatches it, of a number in a result, and of a call of a function, written
#: in Python or not, beside `MULTIPLICATION`. With them gradients and measurements of the MLP and the CNN take about
#: what they take by the clock within training, where a call is slower than in a loop that does nothing else.
OPERATION, NUMBER, CALL = 4e3, 0.4, 1.5e3
#: Steps between two measurements: more than the window of any.
EVERY = 10


class Counter(WorkCounter):
    """Counts calls of functions, too, but for those by which operations come here to be counted.

    Attributes:
        functions: how many calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.functions = 0
        self._counts: FrameType | None = None  # in which an operation is counted

    def __enter__(self) -> "Counter":
        super().__enter__()
        sys.setprofile(self._called)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        super().__exit__(*error)

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._counts is frame and event == "return":
            self._counts = None
        elif self._counts is None and event == "call" and frame.f_code in COUNTING:
            self._counts = frame
        elif self._counts is None:
            self.functions += event.endswith("call")

    @property
    def nanoseconds(self) -> float:
        operations = OPERATION * self.calls + NUMBER * self.elements + MULTIPLICATION * self.flops / 2
        return operations + CALL * self.functions


#: By which an operation comes to be counted: nothing of that is there without a counter.
COUNTING = {Counter.__torch_dispatch__.__code__, find_torch_dispatch_rule.__code__}


@dataclass
class Counts:
    """Gradients of each measurement of a quantity.

    Attributes:
        said: before it, by `Quantity.cost`.
        counted: in it.
        skipped: why it was left out; empty if it was not.
    """

    said: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    unit: float = 0.0
    work: Work | None = None
    spent: float = 0.0
    reading: float = 0.0
    skipped: str = ""

    def watch(self, quantity: Quantity) -> None:
        """Count inside of the quantity's methods from now on."""
        update, after = quantity.update, getattr(quantity, "after_update", None)
        reader = quantity.reader

        def counted_reader(*args: Any) -> Any:
            read, self.reading = reader(*args), 0.0  # of a step that came too early nothing is used
            if read is not None:
                saw_loss, read.saw_loss = read.saw_loss, lambda *a, **k: self.read(lambda: saw_loss(*a, **k))
                form, read.before_replays = read.before_replays, lambda *a: self.read(lambda: form(*a))
            return read

        vars(quantity)["reader"] = counted_reader

        def counted_update(snapshot: Snapshot) -> None:
            if self.work is None:
                self.unit, self.work = gradient(snapshot), work(snapshot)
            if not self.spent:
                assume(snapshot, self.work)  # as a monitor does: a step that was read from its graph has no replay
                computed = dict(snapshot.shared)
                self.said.append(sum(quantity.cost(snapshot).values()))
                snapshot.shared.clear()  # of what the price has computed
                snapshot.shared.update(computed)
            self.add(quantity, lambda: update(snapshot))

        vars(quantity)["update"] = counted_update
        if after is not None:
            vars(quantity)["after_update"] = lambda: self.add(quantity, after)

    def read(self, compute: Any) -> None:
        """Count what is read from the graph of a step, and what is made of it, before its measurement."""
        with Counter() as counter:
            compute()
        self.reading += counter.nanoseconds

    def add(self, quantity: Quantity, compute: Any) -> None:
        with Counter() as counter:
            compute()
        self.spent += counter.nanoseconds + self.reading
        self.reading = 0.0
        if quantity.complete:
            self.counted.append(self.spent / self.unit)
            self.spent = 0.0


def gradient(snapshot: Snapshot) -> float:
    """Nanoseconds of a forward and a backward pass."""
    with Counter() as counter:
        torch.autograd.grad(snapshot.replay(), list(snapshot.parameters.values()), allow_unused=True)
    return counter.nanoseconds


def compare(training: Training, name: str, rounds: int = 3) -> Counts:
    """Measure one quantity several times in a run; empty where it does not apply, or is left out."""
    counts = Counts()
    monitor = StabilityMonitor("default" if name in PRESETS["default"] else [name], every_n_steps=EVERY)
    for other in [other for other in monitor.monitor.quantities if other != name]:
        monitor.monitor.skip({"not asked for": [other]}, warn=False)
        monitor.monitor.quantities.all = tuple(q for q in monitor.monitor.quantities.all if q.name == name)
    counts.watch(monitor.monitor.quantities[name])
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=EVERY * (rounds - 1) + 9, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(training.module(), training.loader())
    counts.skipped = monitor.monitor.skipped.get(name, "")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"all of {', '.join(TRAININGS)}")
    parser.add_argument("--quantities", nargs="+", default=PRESETS["default"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    worst = 1.0
    for network in options.networks or TRAININGS:
        for name in options.quantities:
            counts = compare(TRAININGS[network], name)
            if not counts.counted:
                print(f"{network:17} {name:22} {counts.skipped or '-'}", flush=True)
                continue
            pairs = [(counts.said[i], counts.counted[i]) for i in (0, len(counts.counted) - 1)]
            ratios = [said / counted for said, counted in pairs]
            worst = max([worst, *ratios, *(1 / ratio for ratio in ratios)])
            first, later = (f"{said:6.2f} / {counted:6.2f} = {said / counted:4.2f}" for said, counted in pairs)
            print(f"{network:17} {name:22} first {first}   later {later}", flush=True)
    print(f"worst factor {worst:.2f}; a default measurement may cost {LIMIT:g} steps")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
