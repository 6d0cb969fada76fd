"""What measurements cost: gradients and bytes, predicted, and seconds, measured."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

import torch

from lsp_callbacks.monitor.cadence import Cadence
from lsp_callbacks.monitor.limits import Seconds, check_memory, in_bytes
from lsp_callbacks.monitor.selected_quantities import SelectedQuantities
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.step.snapshot import Snapshot

Quantities = Mapping[str, Quantity]


def measurement_cost(quantities: Quantities, snapshot: Snapshot) -> dict[str, float]:
    """Return the gradients that one measurement of everything costs, by what they are spent on."""
    parts: dict[str, float] = {}
    for quantity in quantities.values():
        try:
            cost = snapshot.run.ranks.together(partial(quantity.cost, snapshot))
        except Exception:  # whatever a replay raises: it takes one to see that
            cost = {"a replay that fails": 1.0}
        for part, gradients in cost.items():
            parts[part] = max(parts.get(part, 0.0), gradients)
    return parts


def measurement_memory(quantities: Quantities, snapshot: Snapshot) -> dict[str, float]:
    """Return the bytes beside training at the peak of each quantity, with what those before it keep for the step.

    A quantity that cannot be measured is not among them.

    Cost: one forward pass.
    """
    peaks: dict[str, float] = {}
    graph = 0.0
    for name, quantity in quantities.items():
        with contextlib.suppress(Exception):  # whatever a replay raises
            parts = quantity.memory(snapshot)
            graph = parts["graph"] = max(graph, parts.get("graph", 0.0))
            peaks[name] = sum(parts.values())
    return peaks


class Budget:
    """Limits of memory and time, and the price of a measurement.

    Args:
        max_memory: bytes, or text such as "2GB"; None is what is free on a CUDA device, and no limit elsewhere.
        time_limit: seconds for one measurement; None is no limit.

    Attributes:
        seconds: what measurements took.
        predicted: bytes at the peak of each quantity, predicted once.
    """

    def __init__(self, max_memory: float | str | None, time_limit: float | None):
        self.max_memory, self.seconds = in_bytes(max_memory), Seconds(time_limit)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seconds.reset()
        self.predicted: dict[str, float] = {}
        self.priced: set[str] | None = None

    def check_memory(self, name: str, quantities: Quantities, snapshot: Snapshot) -> None:
        """Refuse a quantity that would take too much memory.

        It is predicted once for each quantity, so that what is measured does not depend on the length of a batch.

        Raises:
            Unmeasurable: see `check_memory`.
        """
        device = next((p.device for p in snapshot.parameters.values()), torch.device("cpu"))
        if self.max_memory is None and device.type != "cuda":
            return
        if name not in self.predicted:
            self.predicted |= measurement_memory(quantities, snapshot) | self.predicted
        check_memory(self.predicted.get(name, 0.0), self.max_memory, device)

    def too_slow(self, quantities: Quantities, snapshot: Snapshot) -> dict[str, list[str]]:
        """Return the quantities to skip so that the rest fits into the time limit, by the reason.

        Seconds differ between processes: those of rank 0 decide.
        """
        slow: dict[str, list[str]] = {}
        reasons = snapshot.run.ranks.first(lambda: self.seconds.too_long(quantities), "the seconds")
        for name, reason in reasons.items():
            slow.setdefault(reason, []).append(name)
        return slow

    def price(self, quantities: SelectedQuantities, snapshot: Snapshot, cadence: Cadence) -> None:
        """Tell the cadence what a measurement costs, unless it knows the cost of just these quantities.

        The cost differs between processes with the sizes of their batches: that of rank 0 decides.

        Args:
            quantities: that are measured.
            snapshot: a step on which they were.
            cadence: that derives its period from the cost, if it has no fixed one.
        """
        if cadence.every_n_steps is None and quantities.keys() != self.priced:
            gradients = sum(measurement_cost(quantities, snapshot).values())
            cadence.priced(snapshot.run.ranks.first(lambda: gradients, "the cost"), quantities.longest)
            self.priced = set(quantities)
