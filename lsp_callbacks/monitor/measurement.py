"""The measurements of one step."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from lsp_callbacks.errors import NotApplicable, Unsupported
from lsp_callbacks.monitor.budget import Budget
from lsp_callbacks.monitor.cadence import Cadence
from lsp_callbacks.monitor.selected_quantities import SelectedQuantities, Skips
from lsp_callbacks.operators.curvature.hessian import EXACT
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.step.snapshot import Snapshot


@dataclass
class Measured:
    """What the measurements of one step gave.

    Attributes:
        values: of all keys of what is complete; NaN for what failed.
        failures: the reasons by quantity.
        skips: what cannot be measured in the whole run.
        warnings: what the user should know of what is measured.
    """

    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)
    warnings: list[str] = field(default_factory=list)


class Measurement:
    """Measures quantities that are due. Each is one round of the ranks: if it fails on one of them, it does on all.

    Args:
        quantities: that are measured.
        cadence: at which steps they are measured.
        budget: of memory and time.

    Attributes:
        paths: how each quantity was last measured: "exact", "exact, math attention", "finite difference", ...
    """

    def __init__(self, quantities: SelectedQuantities, cadence: Cadence, budget: Budget):
        self.quantities, self.cadence, self.budget = quantities, cadence, budget
        self.paths: dict[str, str] = {}
        self._layouts: dict[str, list] = {}

    def reset(self) -> None:
        """Forget everything."""
        self.paths.clear()
        self._layouts.clear()

    def measure(self, snapshot: Snapshot) -> Measured:
        """Measure what is due at a step.

        Args:
            snapshot: the step.

        Raises:
            Exception: whatever a measurement raised, if the quantities are strict.
        """
        self._check_layout(snapshot)
        self.budget.assume(snapshot)
        measured, quantities = Measured(), self.quantities
        headline, asked = self.cadence.headline, self.cadence.observed(snapshot.step)
        starts = self._start(snapshot, measured, *asked)
        due = starts | self.cadence.under_way
        waiting = [name for name in quantities if name in due]
        waiting.sort(key=lambda name: not quantities[name].reads_graph)  # its memory is free for the others then
        for name, reader in snapshot.readers.items():
            if name not in waiting:  # it was put off
                reader.release()
        while waiting:
            name = waiting.pop(0)
            quantity, begins = quantities[name], name in starts
            self.cadence.under_way.discard(name)  # unless it takes a further step
            self.paths.pop(name, None)
            began, view = time.perf_counter(), snapshot
            try:
                if snapshot.whole_step is not None:
                    view = snapshot.run.ranks.together(partial(quantity.view, snapshot))
                if quantity.without_update:
                    quantities.add_unknown(quantity, view, measured.skips)
                values = snapshot.run.ranks.together(partial(self._values, quantity, snapshot, view, begins, headline))
                self.paths[name] = ", ".join(filter(None, (quantity.path(view), self.budget.reduced.get(name))))
            except Exception as error:
                if quantities.strict and not (isinstance(error, NotApplicable) and name not in quantities.named):
                    raise
                self._fail(measured, quantity, snapshot, error)
                continue
            finally:
                if not self.budget.graphs.intersection(waiting):
                    view.shared.pop(EXACT, None)
            self.budget.seconds.add(name, time.perf_counter() - began, complete=values is not None)
            if values is None:
                self.cadence.under_way.add(name)
            else:
                measured.values |= values
        return measured

    def _start(self, snapshot: Snapshot, measured: Measured, names: tuple[str, ...], unpriced: list[str]) -> set[str]:
        """Return the names of those that start, once their prices are known, and charge them."""
        cadence, step = self.cadence, snapshot.step
        waiting = {name for name in names if self._is_postponed(self.quantities[name], snapshot)}
        self._use_readers(snapshot, {*names, *cadence.under_way} - waiting)
        if unpriced := [name for name in unpriced if name not in waiting]:
            prices = self.budget.prices([self.quantities[name] for name in unpriced], snapshot)
            for name, gradients in prices.dear.items():
                costs = f"one measurement costs {gradients:.0f} gradients by the model of the cost"
                if name in self.quantities.named:
                    measured.warnings.append(f"{name}: {costs}, so it is measured as seldom as the budget asks for")
                else:
                    advice = "name it, or give it a pace by every_n_steps, to measure it all the same"
                    measured.skips.add(name, Unsupported(f"{costs}, more than {prices.limit:.0f}: {advice}"))
                    cadence.drop(name)
                    del prices.parts[name]
            cadence.priced(
                prices.parts, named=self.quantities.named, counting=prices.counting, step_cost=self.budget.step
            )
            names = cadence.starting(step)
        return {*cadence.started(step, names, without=waiting)}

    def _use_readers(self, snapshot: Snapshot, names: set[str]) -> None:
        """Free what was read from the step's own graph, before a replay makes another one."""
        for name, reader in snapshot.readers.items():
            if name not in names:
                reader.release()
                continue
            with contextlib.suppress(Exception):  # the measurement will say why
                snapshot.run.ranks.together(partial(reader.before_replays, snapshot))

    def _values(
        self, quantity: Quantity, snapshot: Snapshot, view: Snapshot, begins: bool, headline: str | None
    ) -> dict[str, float] | None:
        """Return what the step completes, None if it takes further steps; rank 0 decides, so that all ranks agree."""
        if begins:
            self.budget.seconds.begin(quantity.name)
            is_headline = quantity.name == headline
            self.budget.check_memory(quantity.name, self.quantities, snapshot, is_headline=is_headline)
        quantity.update(view)
        values = quantity.numbers() if quantity.complete else None
        return snapshot.run.ranks.of_first(values, quantity.name)

    def _fail(self, measured: Measured, quantity: Quantity, snapshot: Snapshot, error: Exception) -> None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or snapshot.run.ranks.world > 1:
            snapshot.forget()  # graphs that the step's other measurements would share
        if isinstance(error, Unsupported) and quantity.name not in self.quantities.named:
            measured.skips.add(quantity.name, error)
            return
        quantity.load_vectors({})
        measured.failures[quantity.name] = f"{type(error).__name__}: {error}"
        measured.values |= dict.fromkeys(self.quantities.reported_keys(quantity), math.nan)

    def _is_postponed(self, quantity: Quantity, snapshot: Snapshot) -> bool:
        """Return True to postpone the measurement. Decided on rank 0 and broadcast, so that all ranks agree."""
        if not quantity.warms_up:
            return False

        try:
            view, ranks = snapshot, snapshot.run.ranks
            if snapshot.whole_step is not None:
                view = ranks.together(partial(quantity.view, snapshot))
            steps = ranks.first(partial(quantity.warm_up, view), "whether enough is known")
        except Exception:  # the measurement will say why
            return False
        if steps:
            self.cadence.postpone(quantity.name, snapshot.step + steps)
        return bool(steps)

    def _check_layout(self, snapshot: Snapshot) -> None:
        """Restart the quantities if other parameters are trained than before: windows and warm starts do not fit."""
        player = "" if snapshot.player is None else snapshot.player.name
        layout = [(name, p.shape) for name, p in snapshot.parameters.items()]
        if self._layouts.get(player, layout) != layout:
            self.cadence.interrupt()
            self.cadence.forget_prices()
            self.budget.work = None
            for quantity in self.quantities.values():
                quantity.restart()
        self._layouts[player] = layout
