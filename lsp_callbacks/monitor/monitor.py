"""When to measure what; knows of no training loop."""

from __future__ import annotations

import contextlib
import math
import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.errors import NotApplicable, Unmeasurable, Unsupported
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.cadence import Cadence
from lsp_callbacks.monitor.courant_source import CODES, COURANT, GD, SGD, SOURCE, CourantSource
from lsp_callbacks.monitor.limits import Seconds, check_memory, in_bytes
from lsp_callbacks.monitor.losses import LossWatch
from lsp_callbacks.quantities import Numerics, Quantity
from lsp_callbacks.quantities.base import is_global
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.players import require_one
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.series import Trace
from lsp_callbacks.step.snapshot import Snapshot

#: How many points of each global curve a checkpoint carries.
HISTORY_SAVED = 1000
#: Of ``state_dict``. 1 knew fixed periods only.
VERSION = 2


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


def scalars(values: Mapping[str, float]) -> dict[str, float]:
    """The finite global ones: what is shown to those who might stop at a NaN."""
    return {key: value for key, value in values.items() if is_global(key) and math.isfinite(value)}


class Monitor:
    """Feeds training steps to quantities at a cadence that respects a budget, and remembers the curves.

    Args:
        quantities: what to measure.
        every_n_steps: start a measurement every so many steps; None derives it from ``budget``, denser near the edge
            of stability and sparser far from it, see `Cadence`.
        budget: gradients spent on measuring, as a share of those spent on training, by the quantities' own cost model.
        named: names of the quantities that the user asked for; the others may be left out with a warning.
        strict: raise where a measurement fails, instead of recording NaN.
        max_memory: bytes, or "2GB", that a measurement may take beside training. It is predicted before the first one,
            by one more forward pass; what would take more is left out. None is what is free on a CUDA device at the
            time, and no cap elsewhere.
        time_limit: seconds that a measurement may take. Its parts are left out, the longest first, until the rest
            fits; a measurement under way is never broken off. The clock decides: two runs may measure different
            things. None is no limit.

    Attributes:
        history: the curves by key.
        skipped: why a quantity is left out, by its name.
        paths: by which way each quantity was last measured: "exact", "exact, math attention", "finite difference", ...
        trace: loss, rate and energies of the last steps; None where no quantity asks for them.
        courant: which number ``stability/courant`` is, see `CourantSource`.
        losses: what the loss did so far, see `LossRecord`; a loop tells it every step's, ``losses.saw(step, loss)``.

    Raises:
        ValueError: for a cadence below 1, a budget outside (0, 1], or a limit that is not positive.

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
        max_memory: float | str | None = None,
        time_limit: float | None = None,
    ):
        self.cadence = Cadence(every_n_steps, budget)
        self.max_memory, self.seconds = in_bytes(max_memory), Seconds(time_limit)
        self.strict, self.named = strict, set(named)
        self._all = quantities
        self.courant, self.losses = CourantSource(), LossWatch()
        recorded = max((quantity.recorded for quantity in quantities), default=0)
        energies = {name: energy for quantity in quantities for name, energy in quantity.energies.items()}
        state = next((quantity.final_state for quantity in quantities if quantity.final_state is not None), None)
        self.trace = Trace(recorded, energies, state=state) if recorded else None
        self.reset()

    def reset(self) -> None:
        """Forgets everything, as before a first run."""
        for quantity in self._all:
            quantity.reset()
        self.quantities = {quantity.name: quantity for quantity in self._all}
        self.skipped: dict[str, str] = {}
        self.history: dict[str, Curve] = {}
        self.paths: dict[str, str] = {}
        self.cadence.reset()
        self.seconds.reset()
        if self.trace is not None:
            self.trace.reset()
        self.courant.reset()
        self.losses.reset()
        self.predicted: dict[str, float] = {}
        self._priced: set[str] | None = None
        self._begun = False
        self._under_way: set[str] = set()
        self._later: dict[str, int] = {}  # what was too early, and from which step on it no longer is
        self._warned: set[str] = set()
        self._layouts: dict[str, tuple] = {}
        self._ranks = Ranks()
        #: Why the update is not the optimizer's, once it was found to be another.
        self.invalidated: str | None = None

    @property
    def period(self) -> int | None:
        """Steps between measurements where nothing is known of the edge; None before the first one."""
        return self.cadence.period

    @property
    def longest(self) -> int:
        """Steps that a measurement of everything takes."""
        return max((quantity.prepare + quantity.window for quantity in self.quantities.values()), default=1)

    @property
    def keys(self) -> set[str]:
        """The global keys that can appear."""
        own = {key for quantity in self.quantities.values() for key in (*quantity.keys, *quantity.optional)}
        if self.invalidated:
            own -= {key for quantity in self.quantities.values() for key in _lost(quantity)}
        return own | ({COURANT, SOURCE} if own & {SGD, GD} or (self.courant.key and not self.invalidated) else set())

    @property
    def courant_source(self) -> str | None:
        """What ``stability/courant`` is: "courant_sgd" or "courant_gd" for the whole run; None before it is decided."""
        return None if self.courant.key is None else self.courant.key.removeprefix("stability/")

    @property
    def fault(self) -> Fault | None:
        """What made the first NaN or Inf of the run; None before it, and where `Numerics` is not measured."""
        return next((quantity.fault for quantity in self._all if isinstance(quantity, Numerics)), None)

    @property
    def ended_by(self) -> Fault | None:
        """The `fault`, if loss and gradient have not been finite again since."""
        recovered = any(isinstance(quantity, Numerics) and quantity.recovered for quantity in self._all)
        return None if recovered else self.fault

    def require(self, snapshot: Snapshot, *, steps: float = math.inf) -> None:
        """Leave out what cannot be measured on such steps; nothing is replayed.

        Args:
            snapshot: a step of the run that begins.
            steps: how many the run will take, as far as that is known.

        Raises:
            Unmeasurable: if a quantity that the user named is among it.
        """
        self._ranks = snapshot.run.ranks
        reasons: dict[str, list[str]] = {}
        quietly: dict[str, list[str]] = {}
        for name, quantity in self.quantities.items():
            try:
                if snapshot.run.sharded:
                    raise Unmeasurable(snapshot.run.sharded)
                if not quantity.supports_multiple_optimizers:
                    require_one(snapshot.player)
                quantity.check(snapshot)
                if quantity.least_steps > steps:
                    raise NotApplicable(
                        f"it takes {quantity.least_steps} steps, and the run has {steps}: train longer, or give it a "
                        "shorter window"
                    )
            except Unmeasurable as error:
                absent = isinstance(error, NotApplicable)
                if name in self.named or (self.strict and not absent):
                    raise Unmeasurable(f"{name} cannot be measured: {error}") from None
                (quietly if absent else reasons).setdefault(str(error), []).append(name)
        self._leave_out(quietly, warn=False)
        self._leave_out(reasons)
        self._begin(snapshot)

    def _begin(self, snapshot: Snapshot) -> None:
        """At the first step of a run, before any update."""
        if snapshot.step == 0 and not self._begun:
            self._begun = True
            for name, quantity in self.quantities.items():
                with self.warn_instead_of_raise(f"{name} could not look at the weights that the run begins with"):
                    quantity.begin(snapshot.module)

    def _leave_out(self, reasons: dict[str, list[str]], *, warn: bool = True) -> None:
        """Quantities by reason, with one warning for all."""
        for reason, names in reasons.items():
            for name in names:
                self.skipped[name] = reason
                self.quantities.pop(name, None)  # or the key of one that goes on without it
                self._under_way.discard(name)
                self._later.pop(name, None)
                self.paths.pop(name, None)
        if reasons and self.trace is not None:
            left = self.quantities.values()
            asked = {name for quantity in left for name in quantity.energies}
            unseen = all(quantity.final_state is None for quantity in left)
            self.trace.drop(self.trace.energies.keys() - asked, state=unseen)
        if reasons and warn and self._ranks.rank == 0:
            text = "; ".join(f"{' and '.join(names)} ({reason})" for reason, names in reasons.items())
            warnings.warn(f"lsp_callbacks leaves out {text}", stacklevel=3)

    def invalidate_update_metrics(self, observation: Observation | None, reason: str) -> Observation | None:
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
        left = [name for name, quantity in wrong.items() if not quantity.without_update]
        if self.invalidated is None:
            left += [key.removeprefix("stability/") for quantity in wrong.values() for key in _lost(quantity)]
        self._leave_out({reason: left} if left else {})
        self.invalidated, self._priced = self.invalidated or reason, None
        if observation is None:
            return None
        own = {
            key
            for quantity in wrong.values()
            if quantity.complete
            for key in quantity.compute()
            if key not in quantity.without_update
        }
        if self.courant.key in own:
            own |= {COURANT, SOURCE}
        keys = own & observation.values.keys()
        if GD in keys:
            self.courant.invalidate()
        for key in keys:
            self.history[key].values[-1] = math.nan
        return Observation(
            observation.step, observation.values | dict.fromkeys(keys, math.nan), dict.fromkeys(wrong, reason)
        )

    def captures_inputs(self, name: str, module: nn.Module) -> bool:
        """Whether any quantity wants the module's inputs in full."""
        return any(quantity.captures_inputs(name, module) for quantity in self.quantities.values())

    def wants(self, step: int, *, scheduled: float = math.nan) -> bool:
        """Whether `observe` would look at this step: if not, no snapshot needs to be made.

        Args:
            step: of the optimizer.
            scheduled: the rate that this step will use over the critical one, where the caller knows it.
        """
        due = bool(self._under_way) or any(step >= later for later in self._later.values())
        return bool(self.quantities) and (self._starts(step, scheduled) or due)

    def _starts(self, step: int, scheduled: float = math.nan) -> bool:
        first = self.period is None or self.cadence.origin is None
        return not (first and self._under_way) and self.cadence.starts(step, scheduled=scheduled)

    def is_complete(self, step: int, *, within: int = 0) -> bool:
        """Return True if no measurement is under way, and none is postponed to ``within`` the next steps.

        Args:
            step: that was observed last.
            within: a number of steps.
        """
        return not self._under_way and all(later - step > within for later in self._later.values())

    def begin(self, module: nn.Module, *, first: bool = True) -> None:
        """Called before each forward pass in training; only energies that look at the network's state need it.

        Args:
            module: that is trained.
            first: whether it is the first micro-batch of a step.
        """
        if self._records:
            assert self.trace is not None
            with self.warn_instead_of_raise("the final state of the step cannot be seen"):
                self.trace.begin(module, first=first)

    def close(self) -> None:
        """Called when training ends: nothing of ours is left in the module."""
        if self.trace is not None:
            self.trace.close()

    @property
    def _records(self) -> bool:
        return self.trace is not None and any(quantity.recorded for quantity in self.quantities.values())

    def record(
        self,
        step: int,
        loss: Tensor | None,
        optimizer: torch.optim.Optimizer | None,
        module: nn.Module,
        *,
        previous: int | None = None,
    ) -> None:
        """Notes loss, rate and energies of a step, before its update, if any quantity asks for them.

        A loop calls it at every step, on all ranks, with the loss of the whole step, or None where it does not see it;
        `observe` does so with the snapshot's own loss where nobody else did. It never waits for the device. For
        ``previous`` see `Snapshot`.
        """
        if self._records:
            assert self.trace is not None
            lr = math.nan if optimizer is None else largest_learning_rate(optimizer)
            with self.warn_instead_of_raise(f"what is recorded at each step could not be at step {step}"):
                self.trace.record(step, loss, lr=lr, module=module, previous=previous)
            for name, error in self.trace.failed.items():
                self.warn_once(f"the energy {name} is not recorded any more, it raised {error}")

    def observe(self, snapshot: Snapshot) -> Observation | None:
        """Measures what is due at this step.

        Returns:
            What was completed; None if nothing was.

        Raises:
            Exception: whatever a measurement raised, under ``strict``.

        Each measurement is one round of the snapshot's ranks: where it fails on one of them, all say NaN.
        """
        if self.trace is not None:
            self.record(snapshot.step, snapshot.loss, snapshot.optimizer, snapshot.module, previous=snapshot.previous)
        self._begin(snapshot)
        if self.trace is not None or self.invalidated:  # otherwise what is cached of the snapshot stays
            snapshot = replace(snapshot, run=self._run_of(snapshot.run))
        if not self.wants(snapshot.step):
            return None
        starts = self._starts(snapshot.step)
        if starts:
            self.cadence.started(snapshot.step)
        self._ranks = snapshot.run.ranks
        self._notice(snapshot)
        values: dict[str, float] = {}
        failures: dict[str, str] = {}
        unsupported: dict[str, list[str]] = {}
        quietly: dict[str, list[str]] = {}
        for name, quantity in self.quantities.items():
            begins = name not in self._under_way
            if begins and not starts and snapshot.step < self._later.get(name, math.inf):
                continue
            if begins and self._waits(quantity, snapshot):
                continue
            self._later.pop(name, None)
            self._under_way.discard(name)
            self.paths.pop(name, None)
            began = time.perf_counter()
            try:
                found = self._ranks.together(partial(self._measured, quantity, snapshot, begins))
                self.paths[name] = quantity.path(snapshot)
            except Exception as error:
                absent = isinstance(error, NotApplicable) and name not in self.named
                if self.strict and not absent:
                    raise
                if isinstance(error, MemoryError | torch.OutOfMemoryError) or self._ranks.world > 1:
                    snapshot.forget()  # graphs that the step's other measurements would share
                if isinstance(error, Unsupported) and name not in self.named:
                    (quietly if absent else unsupported).setdefault(str(error), []).append(name)
                    continue
                quantity.load_vectors({})
                failures[name] = f"{type(error).__name__}: {error}"
                values |= dict.fromkeys(quantity.keys, math.nan)
                continue
            self.seconds.add(name, time.perf_counter() - began, complete=found is not None)
            if found is None:
                self._under_way.add(name)
            else:
                values |= found
        self._leave_out(quietly, warn=False)
        self._leave_out(unsupported)
        self._warn(failures, snapshot.step)
        if not self._under_way:
            self._reckon(snapshot)
        return self._with_courant(Observation(snapshot.step, {}, failures), values)

    def _with_courant(self, observation: Observation, values: dict[str, float]) -> Observation | None:
        """The observation of a step with the headline number, which may be that of a step before."""
        possible = {key for quantity in self.quantities.values() for key in quantity.keys}
        if self.invalidated:
            possible -= {key for quantity in self.quantities.values() for key in _lost(quantity)}
        headline = self.courant.value(observation.step, values, possible)
        self.cadence.read(self.courant.reading(values))
        if headline is not None and self.courant.key is not None:
            step, value = headline
            told = {COURANT: value}
            if not math.isnan(value):
                told[SOURCE] = CODES[self.courant.key]
            told = self.add(Observation(step, {}), told).values
            observation = replace(observation, values=observation.values | told)
        return self.add(observation, values) if values or observation.values else None

    def _run_of(self, run: RunContext) -> RunContext:
        """The facts of the run, with those that are known here."""
        series = run.series if self.trace is None else self.trace
        return replace(run, series=series, invalidated=self.invalidated or run.invalidated)

    def _notice(self, snapshot: Snapshot) -> None:
        """Other parameters may be trained than before (unfreezing): windows and warm starts are not of their size."""
        player = "" if snapshot.player is None else snapshot.player.name
        layout = tuple((name, p.shape) for name, p in snapshot.parameters.items())
        if self._layouts.get(player, layout) != layout:
            self._under_way.clear()
            self._priced = None
            for quantity in self.quantities.values():
                quantity.restart()
        self._layouts[player] = layout

    def _waits(self, quantity: Quantity, snapshot: Snapshot) -> bool:
        """Whether it is too early; it is measured when it no longer is. Rank 0's word: all must take the same way."""
        if not quantity.warms_up:
            return False

        def missing() -> int:
            try:
                return quantity.warm_up(snapshot)
            except Exception:  # the measurement will say why
                return 0

        steps = self._ranks.first(missing, "whether enough is known")
        if steps:
            self._later[quantity.name] = snapshot.step + steps
        elif self._later.pop(quantity.name, None) is not None:
            self._priced = None  # its first measurement may show what it costs
        return bool(steps)

    def _measured(self, quantity: Quantity, snapshot: Snapshot, begins: bool) -> dict[str, float] | None:
        """What the step completes, None while it takes further steps: rank 0's word, so that all ranks go on alike."""
        if begins:
            self.seconds.begin(quantity.name)
            self._check_memory(quantity.name, snapshot)
        quantity.update(snapshot)
        own = {key: float(value) for key, value in quantity.compute().items()} if quantity.complete else None
        return snapshot.run.ranks.first(lambda: own, quantity.name)

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
            kinds.setdefault(_kind(reason), []).append(name)
        for kind, names in kinds.items():
            if kind not in self._warned and self._ranks.rank == 0:  # it names the rank that failed
                text = f"lsp_callbacks could not measure {', '.join(names)} at step {step}, and says NaN"
                warnings.warn(f"{text}: {failures[names[0]]}", stacklevel=3)
        self._warned |= kinds.keys()

    @contextlib.contextmanager
    def warn_instead_of_raise(self, what: str) -> Iterator[None]:
        """Whatever goes wrong around a measurement is a warning, once; training goes on without it."""
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self.warn_once(f"{what}: {type(error).__name__}: {error}")

    def warn_once(self, text: str) -> None:
        """A warning, once for each kind of text, whatever its numbers are."""
        if _kind(text) not in self._warned:
            warnings.warn(f"lsp_callbacks: {text}", stacklevel=3)
        self._warned.add(_kind(text))

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Gradients that one measurement of everything costs, by what they are spent on."""
        parts: dict[str, float] = {}
        for quantity in self.quantities.values():
            try:
                own = snapshot.run.ranks.together(partial(quantity.cost, snapshot))
            except Exception:  # whatever a replay raises: to find that it fails is one
                own = {"a replay that fails": 1.0}
            for part, gradients in own.items():
                parts[part] = max(parts.get(part, 0.0), gradients)
        return parts

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        """Bytes beside training at the peak of each quantity, predicted, with what those before it keep for the step.

        Costs one forward pass. A quantity that cannot be measured is not among them.
        """
        found: dict[str, float] = {}
        graph = 0.0
        for name, quantity in self.quantities.items():
            with contextlib.suppress(Exception):  # whatever a replay raises
                parts = quantity.memory(snapshot)
                graph = parts["graph"] = max(graph, parts.get("graph", 0.0))
                found[name] = sum(parts.values())
        return found

    def _check_memory(self, name: str, snapshot: Snapshot) -> None:
        """Once for each quantity, so that what is measured does not depend on the length of a batch."""
        device = next((p.device for p in snapshot.parameters.values()), torch.device("cpu"))
        if self.max_memory is None and device.type != "cuda":
            return
        if name not in self.predicted:
            self.predicted |= self.memory(snapshot) | self.predicted
        check_memory(self.predicted.get(name, 0.0), self.max_memory, device)

    def _reckon(self, snapshot: Snapshot) -> None:
        """After a measurement: what it took decides what the next ones are, and when."""
        slow: dict[str, list[str]] = {}
        # Seconds differ between processes, and so may the cost, with the sizes of their batches.
        too_long = snapshot.run.ranks.first(lambda: self.seconds.too_long(self.quantities), "the seconds")
        for name, reason in too_long.items():
            slow.setdefault(reason, []).append(name)
        self._leave_out(slow)
        if self.cadence.every_n_steps is None and self.quantities.keys() != self._priced:
            gradients = sum(self.cost(snapshot).values())
            self.cadence.priced(snapshot.run.ranks.first(lambda: gradients, "the cost"), self.longest)
            self._priced = set(self.quantities)

    def drop(self) -> None:
        """Forgets windows and warm starts: the steps before are not those that come after."""
        self._under_way.clear()
        for quantity in self.quantities.values():
            quantity.load_vectors({})

    def state_dict(self, *, vectors: bool = False) -> dict[str, Any]:
        """Scalars, and on request the vectors of windows that are under way; it changes nothing of what is measured."""
        saved = {
            key: {
                "steps": torch.tensor(curve.steps[-HISTORY_SAVED:]),
                "values": torch.tensor(curve.values[-HISTORY_SAVED:], dtype=torch.float64),
            }
            for key, curve in self.history.items()
            if is_global(key)
        }
        state: dict[str, Any] = {
            "version": VERSION,
            "cadence": self.cadence.state_dict(),
            "later": dict(self._later),
            "priced": None if self._priced is None else sorted(self._priced),
            "history": saved,
            "courant": self.courant.state_dict(),
            "losses": self.losses.state_dict(),
            "under_way": sorted(self._under_way),
            "quantities": {name: quantity.state_dict() for name, quantity in self.quantities.items()},
        }
        if self.trace is not None:
            state["trace"] = self.trace.state_dict(joined=self._ranks.world > 1)
        if vectors:
            state["vectors"] = {name: quantity.vectors() for name, quantity in self.quantities.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, of this version.

        Quantities that are new or gone are left alone. Windows that were under way begin anew where the state does not
        hold their vectors. A state that cannot be read, as that of another version, is left aside with a warning: it is
        measured as in a first run.
        """
        try:
            self._load(state)
        except Exception as error:
            self.reset()
            warnings.warn(
                f"lsp_callbacks begins anew: the checkpoint's state of version {state.get('version')} cannot be read "
                f"({type(error).__name__}: {error})",
                stacklevel=2,
            )

    def _load(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION:
            raise ValueError(f"this release reads version {VERSION}")
        self.history = {
            key: Curve(curve["steps"].tolist(), curve["values"].tolist()) for key, curve in state["history"].items()
        }
        under_way = {name for name in state["under_way"] if name in self.quantities}
        self._under_way = under_way if "vectors" in state else set()
        self._later = {name: step for name, step in state["later"].items() if name in self.quantities}
        self._later |= dict.fromkeys(under_way - self._under_way, 0)
        self.courant.load_state_dict(state["courant"])
        if self.courant.key not in {None, *(key for quantity in self._all for key in quantity.keys)}:
            self.warn_once(f"stability/courant was {self.courant_source} before, which is not measured any more")
            self.courant.reset()
        self.losses.load_state_dict(state["losses"])
        for name, quantity in self.quantities.items():
            quantity.load_state_dict(dict(state["quantities"].get(name, {})), strict=False)
            quantity.load_vectors(state.get("vectors", {}).get(name, {}))
        if self.trace is not None and "trace" in state:
            self.trace.load_state_dict(state["trace"])
        self.cadence.load_state_dict(state["cadence"])
        self._priced = None if state["priced"] is None else set(state["priced"])


def _lost(quantity: Quantity) -> list[str]:
    """What a quantity that goes on without the update does not say any more."""
    keys = (*quantity.keys, *quantity.optional) if quantity.without_update else ()
    return [key for key in keys if key not in quantity.without_update]


def _kind(reason: str) -> str:
    return re.sub(r"[-+.\w]*\d[-+.\w]*", "#", reason)
