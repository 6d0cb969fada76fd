"""The command ``lsp-callbacks cost``: what measuring a configuration takes, from a handful of its steps."""

from __future__ import annotations

import argparse
import contextlib
import math
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lsp_callbacks import report
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.cli.diagram import configured, existing, quiet
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.budget import measurement_memory
from lsp_callbacks.monitor.cadence import MODELLED
from lsp_callbacks.monitor.limits import readable
from lsp_callbacks.step.snapshot import Snapshot

#: Steps whose time is taken, after some that only warm up.
WARM_UP, TIMED = 3, 8
#: Steps that a quantity which is not ready yet is waited for.
PATIENCE = 50
DESCRIPTION = """\
Trains a handful of steps of a configuration of `lsp-callbacks fit`, measures twice, and prints what that takes:
gradients by the model of the cost, milliseconds, memory beside training (predicted), and how often the budget allows
it. Nothing is logged or saved, callbacks of the configuration other than StabilityMonitor are left out. Other options
are those of `lsp-callbacks fit`\
"""


@dataclass
class Costs:
    """What was found.

    Attributes:
        step: seconds of a training step without measuring; the median.
        gradients: by quantity, each as if it were alone.
        total: gradients of one measurement of everything, where quantities share.
        seconds: by quantity, of a measurement that starts from the one before.
        memory: bytes by quantity, predicted.
        period: steps between measurements where nothing is known of the edge.
        budget: that they keep to.
        skipped: why, by quantity.
        waiting: quantities that look back on more steps than were taken here, and were not measured.
    """

    step: float = math.nan
    gradients: dict[str, float] = field(default_factory=dict)
    total: float = math.nan
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    period: int = 0
    budget: float = math.nan
    skipped: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the time, that measuring takes at this period, by the clock."""
        measuring = sum(self.seconds.values()) / self.period
        return measuring / (measuring + self.step)

    def table(self) -> Any:
        """By quantity, of rich."""
        from rich.table import Table

        table = Table("quantity", title="lsp_callbacks: the cost of a measurement")
        for column in ("gradients", "milliseconds", "memory, predicted"):
            table.add_column(column, justify="right")
        for name in self.gradients:
            missing = "not yet" if name in self.waiting else "failed"
            took = f"{1e3 * self.seconds[name]:.1f}" if name in self.seconds else missing
            table.add_row(name, f"{self.gradients[name]:.1f}", took, readable(self.memory.get(name, 0.0)))
        most = readable(max(self.memory.values(), default=0.0))
        table.add_row("together", f"{self.total:.1f}", f"{1e3 * sum(self.seconds.values()):.1f}", most)
        return table

    def sentences(self) -> list[str]:
        """Below the table."""
        kept = max(1, math.ceil(sum(self.seconds.values()) / (self.budget * self.step)))
        found = [
            f"lsp_callbacks: a training step takes {1e3 * self.step:.3g} ms; one measurement in {self.period} steps "
            f"takes {self.share:.1%} of the time by this machine's clock "
            f"(every_n_steps={kept} would take {self.budget:.0%})"
        ]
        if self.waiting:
            names = " and ".join(self.waiting)
            found.append(f"lsp_callbacks: {names} looks back on more steps than were taken here, and was not timed")
        return found + [f"lsp_callbacks: {name} is left out: {reason}" for name, reason in self.skipped.items()]


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after ``cost``.

    Returns:
        The exit status, 1 where the costs cannot be found. Bad arguments end in ``SystemExit(2)``.
    """
    usage = "lsp-callbacks cost --config FILE [--ckpt FILE] [--KEY VALUE ...]"
    parser = argparse.ArgumentParser("lsp-callbacks cost", usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--ckpt", type=existing, metavar="FILE", help="a checkpoint; otherwise the initial weights")
    own, rest = parser.parse_known_args(argv)
    found: list[Costs] = []

    def look(trainer: Any, model: Any, monitor: StabilityMonitor | None, **data: Any) -> None:
        data["ckpt_path"] = own.ckpt or data.get("ckpt_path")
        found.append(measure(trainer, model, monitor or StabilityMonitor(), **data))

    try:
        report.check_installed()
        with quiet():
            configured(rest, look, usage=usage)
    except (Unmeasurable, MisconfigurationException, ImportError, OSError, pickle.UnpicklingError) as error:
        print(f"lsp-callbacks cost: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    report.show(found[0].table(), *found[0].sentences())
    return 0


def measure(trainer: Any, model: Any, monitor: StabilityMonitor, **data: Any) -> Costs:
    """Trains until everything was measured twice, and leaves the trainer by an exception: no hook sees an end.

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
    trainer.callbacks.append(meter)
    vars(model)["configure_callbacks"] = list
    try:
        trainer.fit(model, **data)
    except _Done:
        pass
    finally:
        vars(model).pop("configure_callbacks", None)
        trainer.callbacks.remove(meter)
    if not meter.costs.period:
        raise Unmeasurable("the run ended before a measurement was complete: the loader gives too few batches")
    return meter.costs


class _Done(Exception):
    """All has been seen."""


class _Meter(Callback):
    """Times steps, then lets the monitor see them until it has measured twice."""

    def __init__(self, monitor: StabilityMonitor):
        self.inner, self.costs = monitor, Costs(budget=monitor.monitor.cadence.budget / MODELLED)
        self.steps: list[float] = []
        self.began: float | None = None
        self.given: int | None = None
        self._complete = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # A checkpoint of a run that has ended has a next step, too.
        trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = -1
        self.inner.on_fit_start(trainer, pl_module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        cadence = self.inner.monitor.cadence
        self.given, cadence.every_n_steps = cadence.every_n_steps, None
        self.inner.monitor.budget.max_memory = None
        self.inner.setup(trainer, pl_module, stage)
        self.inner.monitor.reset()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.inner.on_train_start(trainer, pl_module)

    @property
    def measuring(self) -> bool:
        return len(self.steps) >= WARM_UP + TIMED

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.began is not None and not self.measuring:
            self.steps.append(now - self.began)
        self.began = now
        if self.measuring:
            self.inner.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        else:
            self.inner.probes.add(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self.measuring:
            self.inner.on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.measuring:
            return
        monitor = self.inner.monitor
        observe = monitor.observe
        vars(monitor)["observe"] = lambda snapshot: self._seen(snapshot, observe(snapshot))
        try:
            self.inner.on_before_optimizer_step(trainer, pl_module, optimizer)
        finally:
            del vars(monitor)["observe"]

    def _seen(self, snapshot: Snapshot, found: Any) -> Any:
        monitor, costs = self.inner.monitor, self.costs
        soon = any(step - snapshot.step <= PATIENCE for step in monitor.schedule.postponed.values())
        if monitor.cadence.period is None or monitor.schedule.under_way or soon:
            return found
        self._complete += 1
        if self._complete == 1:
            costs.step, costs.memory = median(self.steps[WARM_UP:]), measurement_memory(monitor.quantities, snapshot)
            for name, quantity in monitor.quantities.items():
                with contextlib.suppress(Unmeasurable):
                    costs.gradients[name] = sum(quantity.cost(snapshot).values())
            costs.total, costs.period = monitor.cadence.cost, self.given or monitor.cadence.period or 1
            monitor.cadence.every_n_steps = monitor.cadence.period = monitor.quantities.longest  # the next one at once
        else:
            costs.seconds = {name: monitor.budget.seconds.expected(name) for name in monitor.budget.seconds.taken}
            costs.skipped = monitor.skipped
            seen = replace(snapshot, run=replace(snapshot.run, series=monitor.trace))
            costs.waiting = [name for name, quantity in monitor.quantities.items() if quantity.wait(seen)]
        return found

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.measuring:
            self.inner.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._complete > 1 or (self.measuring and not self.inner.monitor.quantities):
            raise _Done
