"""Question: what does it cost to keep a step for a replay, beside the passes of the replay itself?

Processor time and function calls (of Python and of C) of what surrounds the passes of a measured step: *begin* keeps
module, batch and random state before its forward pass, *snapshot* takes the step after its backward pass, *untouched*
is entered and left once around all replays, and *replay* is all that a replay does but the loss itself. In
microseconds, as medians, beside a gradient of the step. *Begin* and *snapshot* read all parameters once.

Usage:
    python benchmarks/replays_are_cheap.py
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from cost_of_each import MODELS, ROUND, labels, loss_of
from torch import Tensor, nn

from lsp_callbacks.autograd.side_effects import untouched
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.replay import replayer
from lsp_callbacks.step.run_context import RunContext

REPETITIONS = 200


class Calls:
    """Counts calls of functions while it is the profiler."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")


def calls(work: Callable[[], Any]) -> int:
    counter = Calls()
    sys.setprofile(counter)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counter.count - 1  # that of `sys.setprofile`


def microseconds(work: Callable[[], Any], repetitions: int = REPETITIONS) -> float:
    took = []
    for _ in range(repetitions):
        began = time.process_time_ns()
        work()
        took.append((time.process_time_ns() - began) / 1e3)
    return median(took)


def parts(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; one run is shared by all steps, as in training."""
    run = RunContext()
    rule = torch.optim.SGD(net.parameters(), lr=0.0)
    nothing = torch.zeros(())

    def begin() -> PendingStep:
        pending = PendingStep(net, run=run)
        pending.add(batch, lambda module, batch: nothing)
        return pending

    pending = begin()
    replay = replayer(pending.module_copy, pending.parts)

    def enter() -> None:
        with untouched(net):
            pass

    def gradient() -> None:
        net.zero_grad()
        loss_of(net, batch).backward()

    gradient()
    return {
        "begin": begin,
        "snapshot": lambda: pending.snapshot(0, rule, loss=nothing).parameters,
        "untouched": enter,
        "replay": lambda: replay(),
        "gradient": gradient,
    }


def main() -> None:
    torch.set_num_threads(1)
    names = ("begin", "snapshot", "untouched", "replay")
    print(f"| model | {' | '.join(f'{name}: us (calls)' for name in names)} | gradient: us |\n{'|---' * 6}|")
    for model in ROUND:
        build, inputs, size = MODELS[model]
        torch.manual_seed(0)
        net, x = build(), inputs()[:size]
        work = parts(net, (x, labels(net, x)))
        gradient = microseconds(work["gradient"], 5)
        cells = []
        for name in names:
            with untouched(net) if name == "replay" else contextlib.nullcontext():
                cells.append(f"{microseconds(work[name]):.0f} ({calls(work[name])})")
        print(f"| {model} | {' | '.join(cells)} | {gradient:.0f} |", flush=True)


if __name__ == "__main__":
    main()
