"""When to measure what; knows of no training loop."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lsp_callbacks.quantities import Quantity
from lsp_callbacks.ranks import Ranks
from lsp_callbacks.snapshot import Snapshot, Unmeasurable, Unmodelled

#: How many points of each global curve a checkpoint carries.
HISTORY_SAVED = 1000
#: What ``stability/courant`` is: the first of these that a step completes.
DIALS = ("stability/courant_sgd", "stability/courant_gd")


@dataclass(frozen=True)
class Observation:
    """What one step has completed.

    Attributes:
        step: number of the optimizer step.
        values: by key; NaN where a measurement failed.
        failures: the reason, by quantity.
    """

    step: int
    values: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class Curve:
    """One key over time."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class Monitor:
    """Feeds training steps to quantities at a cadence that respects a budget, and remembers the curves.

    Args:
        quantities: what to measure.
        every_n_steps: start a measurement every so many steps; None derives it from ``budget``.
        budget: gradients spent on measuring, as a share of those spent on training, by the quantities' own cost model.
        named: names of the quantities that the user asked for; the others may be left out with a warning.
        strict: raise where a measurement fails, instead of recording NaN.

    Attributes:
        history: the curves by key.
        skipped: why a quantity is left out, by its name.
        paths: by which way each quantity was last measured: "exact", "exact, math attention", "finite difference", ...

    Raises:
        ValueError: for a cadence below 1 or a budget outside (0, 1].

    Example:
        >>> import torch
        >>> from lsp_callbacks import Monitor, Sharpness, Snapshot
        >>> net, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> monitor = Monitor(Sharpness(), every_n_steps=1)
        >>> for step in range(3):
        ...     loss = lambda: net(x).square().mean()
        ...     _ = monitor.observe(Snapshot(step=step, module=net, replay=loss, optimizer=sgd))
        ...     sgd.zero_grad(); loss().backward(); _ = sgd.step()
        >>> monitor.history["stability/courant_gd"].values
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        *quantities: Quantity,
        every_n_steps: int | None = None,
        budget: float = 0.05,
        named: Collection[str] = (),
        strict: bool = False,
    ):
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps}: give a whole number of at least 1, or None for the budget"
            )
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: give a share of the training cost, in (0, 1]")
        self.every_n_steps, self.budget, self.strict = every_n_steps, budget, strict
        self.named = set(named)
        self._all = quantities
        self.reset()

    def reset(self) -> None:
        """Forgets everything, as before a first run."""
        for quantity in self._all:
            quantity.reset()
        self.quantities = {quantity.name: quantity for quantity in self._all}
        self.skipped: dict[str, str] = {}
        self.history: dict[str, Curve] = {}
        self.paths: dict[str, str] = {}
        self.period: int | None = self.every_n_steps
        self.origin: int | None = None
        self._under_way: set[str] = set()
        self._warned: set[str] = set()
        self._ranks = Ranks()

    @property
    def keys(self) -> set[str]:
        """The global keys that can appear."""
        own = {key for quantity in self.quantities.values() for key in (*quantity.keys, *quantity.optional)}
        return own | ({"stability/courant"} if own.intersection(DIALS) else set())

    def require(self, snapshot: Snapshot) -> None:
        """Leaves out what cannot be measured on such steps; replays nothing.

        Raises:
            Unmeasurable: if a quantity that the user named is among it.
        """
        self._ranks = snapshot.ranks
        reasons: dict[str, list[str]] = {}
        for name, quantity in self.quantities.items():
            try:
                if snapshot.sharded:
                    raise Unmeasurable(snapshot.sharded)
                quantity.check(snapshot)
            except Unmeasurable as error:
                if name in self.named or self.strict:
                    raise Unmeasurable(f"{name} cannot be measured: {error}") from None
                reasons.setdefault(str(error), []).append(name)
        self._leave_out(reasons)

    def _leave_out(self, reasons: dict[str, list[str]]) -> None:
        """Quantities by reason, with one warning for all."""
        for reason, names in reasons.items():
            for name in names:
                self.skipped[name] = reason
                del self.quantities[name]
                self._under_way.discard(name)
                self.paths.pop(name, None)
        if reasons and self._ranks.rank == 0:
            text = "; ".join(f"{' and '.join(names)} ({reason})" for reason, names in reasons.items())
            warnings.warn(f"lsp_callbacks leaves out {text}", stacklevel=3)

    def disown_update(self, observation: Observation | None, reason: str) -> Observation | None:
        """The step did not move the parameters as the snapshot said: from now on, nothing that needs the update map.

        Args:
            observation: of that step; its numbers that depend on the update become NaN, in the history too.
            reason: for the warning.

        Returns:
            The corrected observation.

        Raises:
            Unmeasurable: under ``strict``.
        """
        wrong = {name: quantity for name, quantity in self.quantities.items() if quantity.needs_update}
        if self.strict and wrong:
            raise Unmeasurable(f"{' and '.join(wrong)}: {reason}")
        self._leave_out({reason: list(wrong)} if wrong else {})
        if observation is None:
            return None
        own = {key for quantity in wrong.values() if quantity.complete for key in quantity.compute()}
        if own.intersection(DIALS):
            own.add("stability/courant")
        keys = own & observation.values.keys()
        for key in keys:
            self.history[key].values[-1] = math.nan
        return Observation(
            observation.step, observation.values | dict.fromkeys(keys, math.nan), dict.fromkeys(wrong, reason)
        )

    def keeps(self, name: str, module: nn.Module) -> bool:
        """Whether any quantity wants the module's inputs in full."""
        return any(quantity.keeps(name, module) for quantity in self.quantities.values())

    def wants(self, step: int) -> bool:
        """Whether `observe` would look at this step: if not, no snapshot needs to be made."""
        if not self.quantities:
            return False
        return bool(self._under_way) or self._starts(step)

    def _starts(self, step: int) -> bool:
        if self.origin is None or self.period is None:
            return not self._under_way
        return (step - self.origin) % self.period == 0

    def observe(self, snapshot: Snapshot) -> Observation | None:
        """Measures what is due at this step.

        Returns:
            What was completed; None if nothing was.

        Raises:
            Exception: whatever a measurement raised, under ``strict``.

        Each measurement is one round of the snapshot's ranks: where it fails on one of them, all say NaN.
        """
        if not self.wants(snapshot.step):
            return None
        if self.origin is None:
            self.origin = snapshot.step
        self._ranks = snapshot.ranks
        values: dict[str, float] = {}
        failures: dict[str, str] = {}
        starts = self._starts(snapshot.step)
        unmodelled: dict[str, list[str]] = {}
        for name, quantity in self.quantities.items():
            if name not in self._under_way and not starts:
                continue
            self._under_way.discard(name)
            self.paths.pop(name, None)
            try:
                found = self._ranks.together(partial(self._measured, quantity, snapshot))
                self.paths[name] = quantity.path(snapshot)
            except Exception as error:
                if self.strict:
                    raise
                if isinstance(error, Unmodelled) and name not in self.named:
                    unmodelled.setdefault(str(error), []).append(name)
                    continue
                quantity.load_vectors({})
                failures[name] = f"{type(error).__name__}: {error}"
                values |= dict.fromkeys(quantity.keys, math.nan)
                continue
            if found is None:
                self._under_way.add(name)
            else:
                values |= found
        self._leave_out(unmodelled)
        self._warn(failures, snapshot.step)
        if self.period is None and not self._under_way:  # what a first measurement shows is in the cost
            self.period = self._period(snapshot)
        dial = next((key for key in DIALS if key in values), None)
        if dial is not None:
            values["stability/courant"] = values[dial]
        return self.add(Observation(snapshot.step, {}, failures), values) if values else None

    def _measured(self, quantity: Quantity, snapshot: Snapshot) -> dict[str, float] | None:
        """What the step completes, None while it takes further steps: rank 0's word, so that all ranks go on alike."""
        quantity.update(snapshot)
        own = {key: float(value) for key, value in quantity.compute().items()} if quantity.complete else None
        return snapshot.ranks.first(lambda: own, quantity.name)

    def add(self, observation: Observation, values: dict[str, float]) -> Observation:
        """The observation with further values, which go into the history, too."""
        for key, value in values.items():
            curve = self.history.setdefault(key, Curve())
            curve.steps.append(observation.step)
            curve.values.append(value)
        return replace(observation, values=observation.values | values)

    def _warn(self, failures: dict[str, str], step: int) -> None:
        """Once for each kind of reason, whatever its numbers are."""
        kinds: dict[str, list[str]] = {}
        for name, reason in failures.items():
            kinds.setdefault(re.sub(r"[-+.\w]*\d[-+.\w]*", "#", reason), []).append(name)
        for kind, names in kinds.items():
            if kind not in self._warned and self._ranks.rank == 0:  # it names the rank that failed
                text = f"lsp_callbacks could not measure {', '.join(names)} at step {step}, and says NaN"
                warnings.warn(f"{text}: {failures[names[0]]}", stacklevel=3)
        self._warned |= kinds.keys()

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Gradients that one measurement of everything costs, by what they are spent on."""
        parts: dict[str, float] = {}
        for quantity in self.quantities.values():
            with contextlib.suppress(Unmeasurable):  # what cannot be measured costs nothing
                own = snapshot.ranks.together(partial(quantity.cost, snapshot))
                for part, gradients in own.items():
                    parts[part] = max(parts.get(part, 0.0), gradients)
        return parts

    def _period(self, snapshot: Snapshot) -> int:
        longest = max(quantity.prepare + quantity.window for quantity in self.quantities.values())
        gradients = sum(self.cost(snapshot).values())  # the ranks' batches may differ in size
        return max(longest, math.ceil(snapshot.ranks.first(lambda: gradients, "the cost") / self.budget))

    def drop(self) -> None:
        """Forgets windows and warm starts: the steps before are not those that come after.

        Called when a checkpoint is written, so that the run that goes on and the run that resumes measure the same.
        """
        self._under_way.clear()
        for quantity in self.quantities.values():
            quantity.load_vectors({})

    def state_dict(self, *, vectors: bool = False) -> dict[str, Any]:
        """Scalars, and on request the vectors of windows that are under way."""
        saved = {
            key: {
                "steps": torch.tensor(curve.steps[-HISTORY_SAVED:]),
                "values": torch.tensor(curve.values[-HISTORY_SAVED:], dtype=torch.float64),
            }
            for key, curve in self.history.items()
            if key.count("/") == 1
        }
        state: dict[str, Any] = {
            "version": 1,
            "origin": self.origin,
            "period": self.period,
            "history": saved,
            "quantities": {name: quantity.state_dict() for name, quantity in self.quantities.items()},
        }
        if vectors:
            state["vectors"] = {name: quantity.vectors() for name, quantity in self.quantities.items()}
            state["under_way"] = sorted(self._under_way)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; quantities that are new or gone are left alone."""
        self.origin = state["origin"]
        self.period = self.every_n_steps or state["period"]
        self.history = {
            key: Curve(curve["steps"].tolist(), curve["values"].tolist()) for key, curve in state["history"].items()
        }
        self._under_way = {name for name in state.get("under_way", ()) if name in self.quantities}
        for name, quantity in self.quantities.items():
            quantity.load_state_dict(dict(state["quantities"].get(name, {})), strict=False)
            quantity.load_vectors(state.get("vectors", {}).get(name, {}))
