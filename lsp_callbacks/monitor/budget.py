"""What measurements cost: gradients and bytes, predicted, and seconds, measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lsp_callbacks.monitor import limits
from lsp_callbacks.monitor.limits import Seconds, check_memory, default_cap, in_bytes
from lsp_callbacks.monitor.selected_quantities import in_turn
from lsp_callbacks.operators.cost import Work, assume, hooks_cost, step_cost, work
from lsp_callbacks.operators.footprint import Footprint, assume_footprint, footprint
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.step.snapshot import Snapshot

Quantities = Mapping[str, Quantity]
#: Steps of training that one measurement may take, unless the user says how often to make it.
LIMIT = 20.0
#: Gradients that the first measured step takes beside: one forward pass is counted, memory is predicted, and all that
#: is called is called for the first time.
COUNTING = 6.0


def measurement_cost(quantity: Quantity, snapshot: Snapshot) -> dict[str, float]:
    """Return the gradients that one measurement costs, by what they are spent on, with the hooks of its step."""
    try:
        return snapshot.run.ranks.together(lambda: {**quantity.cost(snapshot), **hooks_cost(snapshot)})
    except Exception:  # whatever a replay raises: it takes one to see that
        return {"a replay that fails": 1.0}


def measurement_memory(quantities: Quantities, snapshot: Snapshot) -> dict[str, float]:
    """Return the bytes beside training at the peak of each quantity, with what those before it keep for those after.

    A quantity that cannot be measured is not among them.

    Cost: one forward pass.
    """
    return _peaks(_memory_parts(quantities, snapshot))


def _peaks(parts_of: Mapping[str, dict[str, float]]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    graphs = {name: parts["graph"] for name, parts in parts_of.items() if "graph" in parts}
    last, graph = next(reversed(graphs), None), 0.0
    for name, parts in parts_of.items():
        graph = max(graph, graphs.get(name, 0.0))
        peaks[name] = sum((parts | {"graph": graph}).values())
        graph = 0.0 if name == last else graph
    return peaks


def _memory_parts(quantities: Quantities, snapshot: Snapshot) -> dict[str, dict[str, float]]:
    """Return the bytes of each quantity that can be measured, by what they are for."""
    parts: dict[str, dict[str, float]] = {}
    for name in in_turn(quantities):
        with contextlib.suppress(Exception):  # whatever a replay raises
            parts[name] = quantities[name].memory(snapshot)
    return parts


@dataclass(frozen=True)
class Prices:
    """What measurements will cost.

    Attributes:
        parts: gradients by quantity, and by what they are spent on.
        counting: gradients that were spent on finding this out.
        limit: gradients that one measurement may cost.
    """

    parts: dict[str, dict[str, float]]
    counting: float
    limit: float

    @property
    def dear(self) -> dict[str, float]:
        """Return the gradients of those that cost more than the limit."""
        totals = {name: sum(parts.values()) for name, parts in self.parts.items()}
        return {name: total for name, total in totals.items() if total > self.limit}


class Budget:
    """Limits of cost, memory and time, and the price of a measurement.

    Args:
        max_memory: bytes, or text such as "2GB"; None is what is free on a CUDA device, and `default_cap` elsewhere.
        time_limit: seconds for one measurement; None is no limit.

    Attributes:
        seconds: what measurements took.
        predicted: bytes at the peak of each quantity, predicted once.
        graphs: names of those that share the graph of exact Hessian products with others of their step.
        work: of one forward pass, counted once.
        step: gradients that a whole step of training takes.
        reduced: what was left out of a measurement so that it costs less, by quantity.
    """

    def __init__(self, max_memory: float | str | None, time_limit: float | None):
        self.max_memory, self.seconds = in_bytes(max_memory), Seconds(time_limit)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seconds.reset()
        self.predicted: dict[str, float] = {}
        self.graphs: set[str] = set()
        self.work: Work | None = None
        self.step = 1.0
        self.reduced: dict[str, str] = {}
        self._training: Footprint | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "work": None if self.work is None else asdict(self.work),
            "step": self.step,
            "reduced": {**self.reduced},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.work = None if state["work"] is None else Work(**state["work"])
        self.step, self.reduced = state["step"], dict(state["reduced"])

    def check_memory(self, name: str, quantities: Quantities, snapshot: Snapshot, *, is_headline: bool = False) -> None:
        """Refuse a quantity that would take too much memory.

        It is predicted once for each quantity, so that what is measured does not depend on the length of a batch.

        Raises:
            Unmeasurable: see `check_memory`.
        """
        device = next((p.device for p in snapshot.parameters.values()), torch.device("cpu"))
        if name not in self.predicted:
            parts_of = _memory_parts(quantities, snapshot)
            self.predicted |= _peaks(parts_of) | self.predicted
            self.graphs |= {name for name, parts in parts_of.items() if "graph" in parts}
            with contextlib.suppress(Exception):  # whatever a replay raises
                self._training = footprint(snapshot)
        multiple = limits.HEADLINE if is_headline else limits.MULTIPLE
        limit = {"default": self._cap(multiple), "multiple": multiple}
        check_memory(self.predicted.get(name, 0.0), self.max_memory, device, **limit)

    def assume(self, snapshot: Snapshot) -> None:
        """Take what training holds in memory as it was at an earlier step."""
        if self._training is not None:
            assume_footprint(snapshot, self._training)

    def room(self) -> float:
        """Return how many bytes a measurement may take beside training, as far as that is known; otherwise infinity."""
        return self._cap(limits.MULTIPLE) if self.max_memory is None else self.max_memory

    def _cap(self, multiple: float) -> float:
        return math.inf if self._training is None else default_cap(self._training, multiple)

    def too_slow(self, quantities: Quantities, snapshot: Snapshot) -> dict[str, list[str]]:
        """Return the quantities to skip so that the rest fits into the time limit, by the reason.

        Seconds differ between processes: those of rank 0 decide.
        """
        slow: dict[str, list[str]] = {}
        reasons = snapshot.run.ranks.first(lambda: self.seconds.too_long(quantities), "the seconds")
        for name, reason in reasons.items():
            slow.setdefault(reason, []).append(name)
        return slow

    def prices(self, quantities: Sequence[Quantity], snapshot: Snapshot) -> Prices:
        """Return what measurements cost, before they start.

        A quantity that costs more than `LIMIT` steps is asked to take less. The cost differs between processes with the
        sizes of their batches: that of rank 0 counts.

        Args:
            quantities: that are about to be measured.
            snapshot: the step on which they would be.
        """
        counting = 0.0
        if self.work is not None:
            assume(snapshot, self.work)
        else:
            with contextlib.suppress(Exception):  # whatever a replay raises
                counting, self.work, self.step = COUNTING, work(snapshot), step_cost(snapshot)
        counting, self.step = snapshot.run.ranks.first(lambda: (counting, self.step), "the work of a step")
        parts: dict[str, dict[str, float]] = {}
        for quantity in quantities:
            parts[quantity.name] = self._price(quantity, snapshot)
            if sum(parts[quantity.name].values()) > LIMIT * self.step:
                self._reduce(quantity, snapshot)
                parts[quantity.name] = self._price(quantity, snapshot)
        return Prices(parts, counting, LIMIT * self.step)

    def _price(self, quantity: Quantity, snapshot: Snapshot) -> dict[str, float]:
        parts = measurement_cost(quantity, snapshot)
        return snapshot.run.ranks.first(lambda: parts, "the cost")

    def _reduce(self, quantity: Quantity, snapshot: Snapshot) -> None:
        with contextlib.suppress(Exception):  # whatever a replay raises
            reduced = snapshot.run.ranks.together(partial(quantity.limit_cost, snapshot, LIMIT * self.step))
            if reduced is not None:
                self.reduced[quantity.name] = reduced
