"""What measurements take: gradients and bytes, known before they start, and seconds, known after they ended."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from lsp_callbacks._validation import number
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.operators.cost import Work, assume, gradient_time, hooks_cost, step_cost, work
from lsp_callbacks.operators.footprint import FOOTPRINT, Footprint, footprint, readable
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.step.room import Room
from lsp_callbacks.step.snapshot import Snapshot

Quantities = Mapping[str, Quantity]
#: Steps of training that one measurement may take, unless the user says how often to make it.
LIMIT = 20.0
#: Gradients that the first measured step takes beside, at most: one forward pass is counted, memory is predicted, and
#: all that is called is called for the first time, in so many nanoseconds beside a gradient for the passes.
COUNTING, FIRST_CALLS = 6.0, 2e7
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
#: On the CPU, where nothing is said, the peak may be so many times that of training, or so many bytes beside training.
MULTIPLE, FLOOR = 1.5, 256e6
#: Bytes that a process grows by beyond its imports when a small network is trained: code that is loaded when used.
LIBRARIES = 2e7
#: Likewise while the headline number is measured, which comes first.
HEADLINE = 3.0
#: Vectors of the size of the weights that training holds between two steps: weights, gradient, two moments.
HELD = 4.0
#: A first measurement takes this many times as long as the next ones.
COLD = 3.0


def measurement_cost(quantity: Quantity, snapshot: Snapshot) -> dict[str, float]:
    """Return the gradients that one measurement costs, by what they are spent on, with the hooks of its step."""
    try:
        view = _view(quantity, snapshot)
        return snapshot.run.ranks.together(lambda: {**quantity.cost(view), **hooks_cost(view)})
    except Exception:  # whatever a replay raises: it takes one to see that
        return {"a replay that fails": 1.0}


def _view(quantity: Quantity, snapshot: Snapshot) -> Snapshot:
    """Return a step as a quantity looks at it, with the work of its passes, which is not counted again."""
    view = snapshot.run.ranks.together(partial(quantity.view, snapshot))
    if view is not snapshot:
        assume(view, replace(work(snapshot), parameters=sum(p.numel() for p in view.parameters.values())))
    return view


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
    for name in sorted(quantities, key=lambda name: not quantities[name].reads_graph):  # as they are measured
        with contextlib.suppress(Exception):  # whatever a replay raises
            parts[name] = snapshot.run.ranks.apart(partial(_parts_of, quantities[name], snapshot))
    return parts


def _parts_of(quantity: Quantity, snapshot: Snapshot) -> dict[str, float]:
    view = quantity.view(snapshot)
    parts = quantity.memory(view)
    if view is not snapshot:  # the weights and gradients that were gathered
        parts = parts | {"whole weights": 2.0 * sum(p.numel() * p.element_size() for p in view.module.parameters())}
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


def in_bytes(value: Any) -> float | None:
    """Return ``max_memory`` as a number of bytes.

    Args:
        value: bytes, or text such as "2GB", "500 MiB"; None is no limit.

    Raises:
        ValueError: for anything else.

    Example:
        >>> from lsp_callbacks.monitor.budget import in_bytes
        >>> in_bytes("1.5 GB"), in_bytes("2KiB"), in_bytes(7)
        (1500000000.0, 2048.0, 7.0)
    """
    if value is None:
        return None
    how = " of bytes, text such as '2GB', or None"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?i?)B?\s*", value.upper().replace("I", "i"))
        if match is None or match[2] not in UNITS:
            raise ValueError(f"max_memory={value!r}: give a number of bytes, or text such as '2GB' or '500MiB'")
        return float(number("max_memory", float(match[1]) * UNITS[match[2]], above=0, instead=how))
    return float(number("max_memory", value, above=0, instead=how))


def default_cap(training: Footprint, multiple: float = MULTIPLE) -> float:
    """Return how many bytes a measurement may take on the CPU where nothing is said.

    It starts when the step's own graph is gone, beside the weights, the gradient, and two moments of the optimizer. So
    ``held + bytes <= multiple (held + activations)``: with 1.5 the peak of the process grows by half at most, against
    training alone. `FLOOR` at least: that is less than the interpreter and its libraries take, and small networks keep
    their numbers.
    """
    return max(FLOOR, beside_training(training, multiple))


def beside_training(training: Footprint, multiple: float, beside: float = 0.0) -> float:
    """Return how many bytes beside training make its peak so many times as high.

    Args:
        training: what it holds.
        multiple: how many times.
        beside: bytes that the process holds beside training, and that count with it.
    """
    held = HELD * training.parameters + beside
    return multiple * (held + training.activations) - held


def check_memory(
    predicted: float,
    cap: float | None,
    device: torch.device,
    *,
    default: float = math.inf,
    multiple: float = MULTIPLE,
) -> None:
    """Refuse a measurement that would need too much memory beside training.

    Args:
        predicted: bytes at its peak.
        cap: bytes; None is what is free at the moment on a CUDA device, and ``default`` elsewhere.
        device: of the parameters.
        default: bytes.
        multiple: of the peak of training, that ``default`` stands for.

    Raises:
        Unsupported: above the cap, as it will be at every step.
        Unmeasurable: above what is free now.
    """
    advice = "allow more with max_memory=..., or measure part of the batch with sub_batch=..."
    if cap is not None and predicted > cap:
        raise Unsupported(
            f"it would take {readable(predicted)} beside training, more than max_memory={readable(cap)}: {advice}"
        )
    if cap is None and device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved
        if predicted > free:
            raise Unmeasurable(
                f"it would take {readable(predicted)} beside training, and {readable(free)} are free: measure "
                "part of the batch with sub_batch=..., or train with a smaller batch"
            )
    elif cap is None and predicted > default:
        raise Unsupported(
            f"it would take {readable(predicted)} beside training, more than {readable(default)}: the peak would be "
            f"above {multiple:g} times that of training alone: {advice}"
        )


class Seconds:
    """How long measurements took, and which of them fit into a limit.

    The clock is not the same in two runs: with a limit, what is measured may differ between them.

    Args:
        limit: seconds for one measurement of everything; None is no limit.

    Raises:
        ValueError: for a limit that is not positive.
    """

    def __init__(self, limit: float | None):
        if limit is not None:
            number("time_limit", limit, above=0, instead=" of seconds, or None")
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._now: dict[str, float] = {}
        self.taken: dict[str, list[float]] = {}

    def begin(self, name: str) -> None:
        """Start a measurement, whether or not the one before was completed."""
        self._now.pop(name, None)

    def add(self, name: str, seconds: float, *, complete: bool) -> None:
        """Add the seconds of one step of a measurement, which counts when it is complete."""
        self._now[name] = self._now.get(name, 0.0) + seconds
        if complete:
            self.taken.setdefault(name, []).append(self._now.pop(name))

    def expected(self, name: str) -> float:
        """Return the seconds of the next measurement: the least so far, a third of the first, which starts cold."""
        taken = self.taken.get(name, [])
        return min(taken[1:], default=taken[0] / COLD) if taken else 0.0

    def too_long(self, names: Collection[str]) -> dict[str, str]:
        """Return which measurements to skip, the longest first, so that the rest fits, and why."""
        left = sorted(names, key=self.expected)
        reasons: dict[str, str] = {}
        while self.limit is not None and left and sum(map(self.expected, left)) > self.limit:
            total, name = sum(map(self.expected, left)), left.pop()
            reasons[name] = (
                f"a measurement takes {total:.3g} seconds, {self.expected(name):.3g} of them for this, more than "
                f"time_limit={self.limit:g}"
            )
        return reasons


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
            with contextlib.suppress(Exception):  # whatever a replay raises
                self._training = footprint(snapshot)  # first: what is done in pieces depends on the room
            of_rank = _memory_parts(quantities, snapshot), self._training
            parts_of, self._training = snapshot.run.ranks.of_first(of_rank, "the memory")  # so that all skip the same
            self.predicted |= _peaks(parts_of) | self.predicted
            self.graphs |= {name for name, parts in parts_of.items() if "graph" in parts}
        multiple = HEADLINE if is_headline else MULTIPLE
        limit = {"default": self._cap(multiple), "multiple": multiple}
        check_memory(self.predicted.get(name, 0.0), self.max_memory, device, **limit)

    def assume(self, snapshot: Snapshot) -> None:
        """Take what training holds in memory as it was at an earlier step."""
        if self._training is not None:
            snapshot.shared[FOOTPRINT] = self._training

    def room(self) -> Room:
        """Return how many bytes a measurement may take beside training, as far as that is known; otherwise infinity."""
        if self.max_memory is not None:
            return Room(self.max_memory, self.max_memory)
        if self._training is None:
            return Room()
        # What can be had in pieces need not take the floor, which on a small network is more than there is in training.
        return Room(beside_training(self._training, MULTIPLE, LIBRARIES), self._cap(MULTIPLE))

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
                self.work, self.step = work(snapshot), step_cost(snapshot)
                counting = min(COUNTING, 1 + FIRST_CALLS / gradient_time(snapshot))
                self._training = self._training or footprint(snapshot)  # the price depends on the room
        counting, self.step = snapshot.run.ranks.of_first((counting, self.step), "the work of a step")
        parts: dict[str, dict[str, float]] = {}
        for quantity in quantities:
            parts[quantity.name] = self._price(quantity, snapshot)
            if sum(parts[quantity.name].values()) > LIMIT * self.step:
                self._reduce(quantity, snapshot)
                parts[quantity.name] = self._price(quantity, snapshot)
        return Prices(parts, counting, LIMIT * self.step)

    def _price(self, quantity: Quantity, snapshot: Snapshot) -> dict[str, float]:
        return snapshot.run.ranks.of_first(measurement_cost(quantity, snapshot), "the cost")

    def _reduce(self, quantity: Quantity, snapshot: Snapshot) -> None:
        with contextlib.suppress(Exception):  # whatever a replay raises
            view = _view(quantity, snapshot)
            reduced = snapshot.run.ranks.together(partial(quantity.limit_cost, view, LIMIT * self.step))
            if reduced is not None:
                self.reduced[quantity.name] = reduced
