"""The command ``lsp-callbacks cost``: what it takes to measure a configuration, from a handful of its steps."""

from __future__ import annotations

import argparse
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lsp_callbacks import report
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import call_hook
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.cli.configured import (
    Done,
    existing,
    fit_until_done,
    print_failure,
    quiet,
    train_without_end,
    with_configuration,
)
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.account import union
from lsp_callbacks.monitor.budget import measurement_cost, measurement_memory
from lsp_callbacks.monitor.cadence import MODELLED, Cadence
from lsp_callbacks.monitor.foretelling import foretell
from lsp_callbacks.operators.footprint import readable
from lsp_callbacks.step.snapshot import Snapshot

#: Steps whose time is taken, after some that only warm up.
WARM_UP, TIMED = 3, 8
#: Steps that a quantity may take to become ready.
PATIENCE = 50
#: Steps of the run for which readings are foretold.
RUN = 1000
DESCRIPTION = """\
Trains a handful of steps of a configuration of `lsp-callbacks fit`, measures twice, and prints for each quantity what
that takes: gradients by the model of the cost, how often the budget allows it, milliseconds, and memory beside
training (predicted). Nothing is logged or saved, callbacks of the configuration other than StabilityMonitor are left
out. Other options are those of `lsp-callbacks fit`\
"""


@dataclass
class Costs:
    """What measuring takes.

    Attributes:
        step: seconds of a training step without measuring; the median.
        gradients: by quantity, of a measurement that starts from the one before, each as if it were alone.
        total: gradients of one measurement of everything, where quantities share.
        seconds: by quantity, of a measurement that starts from the one before.
        memory: bytes by quantity, predicted.
        period: steps between measurements by quantity, where nothing is known of the edge.
        readings: how many there are in the first 1,000 steps, by quantity, likewise.
        budget: that they keep to.
        skipped: why, by quantity.
        waiting: quantities that look back on more steps than were taken here, and were not measured.
    """

    step: float = math.nan
    gradients: dict[str, float] = field(default_factory=dict)
    total: float = math.nan
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    period: dict[str, float] = field(default_factory=dict)
    readings: dict[str, int] = field(default_factory=dict)
    budget: float = math.nan
    skipped: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the time of 1,000 steps that measuring takes, by the clock."""
        measuring = sum(self.readings[name] * seconds for name, seconds in self.seconds.items())
        return measuring / (measuring + RUN * self.step)

    def table(self) -> Any:
        """Return a table of rich, by quantity."""
        from rich.table import Table

        table = Table("quantity", title="lsp_callbacks: the cost of a measurement")
        for column in ("gradients", "period", f"in {RUN:,} steps", "milliseconds", "memory, predicted"):
            table.add_column(column, justify="right")
        for name, gradients in self.gradients.items():
            missing = "not yet" if name in self.waiting else "failed"
            took = f"{1e3 * self.seconds[name]:.1f}" if name in self.seconds else missing
            pace = f"{self.period[name]:,.0f}", f"{self.readings[name]:,}"
            table.add_row(name, f"{gradients:.1f}", *pace, took, readable(self.memory.get(name, 0.0)))
        most = readable(max(self.memory.values(), default=0.0))
        table.add_row("together", f"{self.total:.1f}", "", "", f"{1e3 * sum(self.seconds.values()):.1f}", most)
        return table

    def sentences(self) -> list[str]:
        """Return what stands below the table."""
        affordable = max(1, math.ceil(sum(self.seconds.values()) / (self.budget * self.step)))
        sentences = [
            f"lsp_callbacks: a training step takes {1e3 * self.step:.3g} ms; so many measurements take "
            f"{self.share:.1%} of the time by this machine's clock (every_n_steps={affordable} would take "
            f"{self.budget:.0%})"
        ]
        if self.waiting:
            names = " and ".join(self.waiting)
            sentences.append(f"lsp_callbacks: {names} looks back on more steps than were taken here, and was not timed")
        return sentences + [f"lsp_callbacks: {name} is left out: {reason}" for name, reason in self.skipped.items()]


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after ``cost``.

    Returns:
        The exit status, 1 where the costs cannot be found. Bad arguments end in ``SystemExit(2)``.
    """
    usage = "lsp-callbacks cost --config FILE [--ckpt FILE] [--KEY VALUE ...]"
    parser = argparse.ArgumentParser("lsp-callbacks cost", usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--ckpt", type=existing, metavar="FILE", help="a checkpoint; otherwise the initial weights")
    options, rest = parser.parse_known_args(argv)
    costs: list[Costs] = []

    def use(trainer: Any, model: Any, monitor: StabilityMonitor | None, **data: Any) -> None:
        data["ckpt_path"] = options.ckpt or data.get("ckpt_path")
        costs.append(measure(trainer, model, monitor or StabilityMonitor(), **data))

    try:
        report.check_installed()
        with quiet():
            with_configuration(rest, use, usage=usage)
    except (Unmeasurable, MisconfigurationException, ImportError, OSError, pickle.UnpicklingError) as error:
        return print_failure("cost", error)
    report.print_report(costs[0].table(), *costs[0].sentences())
    return 0


def measure(trainer: Any, model: Any, monitor: StabilityMonitor, **data: Any) -> Costs:
    """Train until everything was measured twice, and leave the trainer by an exception: no hook sees an end.

    Args:
        trainer: of either name of Lightning; it is used up, and the module has been trained.
        model: the LightningModule.
        monitor: what to measure.
        data: other arguments of ``trainer.fit``.

    Raises:
        Unmeasurable: if the loader gives no batch.
    """
    if trainer.num_devices * trainer.num_nodes > 1:
        raise Unmeasurable("several processes: predict the cost of one, with --trainer.devices 1")
    meter = _Meter(monitor)
    monitor.observer.listeners.append(meter.count_measurement)
    try:
        fit_until_done(trainer, model, meter, **data)
    finally:
        monitor.observer.listeners.remove(meter.count_measurement)
    if meter.inner.monitor.quantities and not meter.is_complete:
        raise Unmeasurable("the run ended before a measurement was complete: the loader gives too few batches")
    return meter.costs


class _Meter(Callback):
    """Times steps, then lets the monitor see them until it has measured everything twice."""

    def __init__(self, monitor: StabilityMonitor):
        cadence = monitor.monitor.cadence
        self.inner, self.costs = monitor, Costs(budget=cadence.budget / MODELLED)
        self.planned = Cadence(cadence.every_n_steps, cadence.budget)
        self.steps: list[float] = []
        self.first: dict[str, dict[str, float]] = {}
        self.is_complete = False
        self._began: float | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        train_without_end(trainer)
        self.inner.on_fit_start(trainer, pl_module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        monitor = self.inner.monitor
        monitor.cadence.every_n_steps = monitor.budget.max_memory = None
        self.inner.setup(trainer, pl_module, stage)
        monitor.reset()
        monitor.cadence.account.advance = math.inf  # everything at once

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.inner.on_train_start(trainer, pl_module)

    @property
    def measuring(self) -> bool:
        return len(self.steps) >= WARM_UP + TIMED

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._began is not None and not self.measuring:
            self.steps.append(now - self._began)
        self._began = now
        if self.measuring:
            call_hook(self.inner, "on_train_batch_start", trainer, pl_module, batch, batch_idx)
        else:
            self.inner.observer.probes.add(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self.measuring:
            call_hook(self.inner, "on_before_backward", trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.measuring:
            call_hook(self.inner, "on_before_optimizer_step", trainer, pl_module, optimizer)

    def count_measurement(self, snapshot: Snapshot) -> None:
        """Look at the costs after a step that has completed the second measurement of everything."""
        monitor, costs = self.inner.monitor, self.costs
        paces = monitor.cadence.paces
        ready = {name: pace for name, pace in paces.items() if pace.postponed is None}
        self.first = {name: pace.parts for name, pace in paces.items() if pace.count == 1 and pace.parts} | self.first
        is_first = not costs.memory and bool(monitor.quantities)
        if is_first:
            costs.step, costs.memory = median(self.steps[WARM_UP:]), measurement_memory(monitor.quantities, snapshot)
        if (
            not monitor.cadence.is_complete(snapshot.step, within=PATIENCE)
            or min((pace.count for pace in ready.values()), default=2) < 2
        ):
            for name, pace in ready.items():
                if pace.count == 1 and name not in monitor.cadence.under_way:
                    monitor.cadence.restart(name)
            return
        self.is_complete = True
        for name, quantity in monitor.quantities.items():
            self.planned.add(name, weight=quantity.weight, length=paces[name].length)
        prices = {name: measurement_cost(quantity, snapshot) for name, quantity in monitor.quantities.items()}
        costs.gradients = {name: sum(parts.values()) for name, parts in prices.items()}
        costs.total = sum(union(prices.values()).values())
        self.planned.headline = monitor.cadence.headline
        costs.readings, costs.period = foretell(
            self.planned, prices, monitor.quantities.named, first=self.first, step_cost=monitor.budget.step
        )
        costs.seconds = {name: monitor.budget.seconds.expected(name) for name in monitor.budget.seconds.taken}
        costs.skipped = monitor.quantities.skipped
        step = replace(snapshot, run=replace(snapshot.run, series=monitor.trace))
        costs.waiting = [name for name, quantity in monitor.quantities.items() if quantity.warm_up(step)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.measuring:
            call_hook(self.inner, "on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)
        if self.is_complete or (self.measuring and not self.inner.monitor.quantities):
            raise Done
