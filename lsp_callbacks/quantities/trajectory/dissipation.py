"""How fast the loss, and other energies, fall along a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.dissipation import dissipation
from lsp_callbacks.linalg import Sketch, norm
from lsp_callbacks.operators.cost import beside
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.module_filter import imported
from lsp_callbacks.quantities.trajectory.reference_point import (
    NOWHERE,
    existing_file,
    position,
    position_in,
    squared_distance,
)
from lsp_callbacks.step.energies import Energy, parameters_of
from lsp_callbacks.step.module_output import submodule
from lsp_callbacks.step.snapshot import Snapshot

#: What is known of each energy, and what is always there.
KEYS = ("dissipation", "energy_increases", "dissipation_lower", "dissipation_upper", "dissipation_floor",
        "dissipation_floor_error")  # fmt: skip
ALWAYS = 2


class Dissipation(Quantity):
    """``gamma = 1 - q`` of ``E_{t+1} = q E_t + c``: what an energy loses of its excess over the floor in each step.

    The energies are those of the step before its update. One is the loss of the step; with ``reference`` another is
    ``||theta - theta_ref||^2``, called "distance", the energy of SGD's law; with ``state`` another is the mean over the
    samples of ``0.5 ||X_L||^2``, called "state"; with both there is "joint", ``0.5 (||X_L||^2 + ||theta -
    theta_ref||^2)``; ``energies`` adds the user's own. For ``theta+ = theta - lr (lambda theta + noise)`` the energy
    ``theta^2`` has ``q = (1 - lr lambda)^2``. Positive: the energy comes down to its floor, and ``1 / gamma`` steps
    bring it down by e. At 0 nothing dissipates: it wanders, and a lower rate, or a larger one where it merely creeps,
    is worth a try. Below 0 it departs: lower the learning rate. A floor that is too high comes down with the learning
    rate, or with larger batches.

    The loss of a mini-batch carries the noise of its own batch, which pulls gamma to 1, the more so on a plateau: read
    the bounds, which allow for that, and are absent where nothing can be told. See `functional.dissipation`.

    "joint" is the quadratic energy of the state ``(X_L, theta)`` that Thm 3.1 and Assumption 3 speak of, with both
    constants 1/2, and "state" that of the forward pass in 6.6. There parameters are fixed and it falls with depth; here
    it is a series over training. It does not bound theta, so that alone it is no energy in the sense of Assumption 3,
    for which 6.6 takes it. It comes down to the outputs that the data ask for, and samples differ between batches:
    floor and noise hold both. 6.6's objective ``Phi = L + R`` of a proximal step is a user's energy, as in the example;
    the paper's ``-c ||theta+ - theta||^2`` is less than Assumption 4 asks.

    Katende's Thm 3.1 asks for a coercive energy with ``E(S+) - E(S) <= -gamma (||X_L||^2 + ||theta||^2) + R``, and says
    that it exists if and only if all sensitivities stay bounded. As printed, that bounded sensitivities are enough is
    false: those of the identity ``theta+ = theta`` are bounded by 1, and no energy falls. It stays false with ``theta -
    theta*`` in the place of theta, as it must be for minima that are not 0. True is: where some energy between two
    multiples of ``||theta - theta*||^2`` falls by a factor below 1 in each step, the distance falls geometrically, to
    the floor of the noise. That is what is measured: the factor, along this run alone; it proves nothing of others.

    Args:
        length: how many of the last steps the fit takes in, at most.
        energies: by name, functions of the module, or their import paths: one number from the parameters, cheap, for
            they are called at every step, without random numbers and without changing anything. A further parameter
            ``loss`` is given the step's loss, and ``state`` X_L, ``(samples, ...)`` without a graph; under accumulation
            that of each micro-batch by itself, and the mean, weighted by samples, is recorded.
        reference: "initial" for the parameters at the first step that is recorded, or the path of a checkpoint. The
            distance is known to 6 %, from a random sketch; that takes a byte for each parameter, and some passes over
            them at each step.
        state: name of the module whose output is X_L, the last features or the logits, as in ``named_modules``; "" is
            the root. It returns one tensor and is called once for each batch, in training mode; where that cannot be
            told, the energies that ask for it are NaN, with the reason. A hook keeps a copy of the output until the
            update.

    Keys: ``stability/dissipation`` with its one-sided 90 % bounds ``_lower`` and ``_upper``, and ``_floor`` (units of
    the loss, where q < 1) with its error; ``stability/energy_increases``, the share of steps in which the loss rose.
    Those of another energy have ``_of/<name>`` at their end. Nothing is said before 60 steps are known. A run that is
    resumed goes on with the series, and measures as if it had never been killed. Not so under DDP: there each process
    has a series of its own, and it goes on only with what all knew at the last measurement, if that was the last step
    before the checkpoint; otherwise it begins anew.

    Raises:
        ValueError: for bad arguments; an energy that asks for something else, or for the state without ``state``.

    Cost: at each step a copy of some numbers and the energies, that of ``reference`` about half a gradient; a
    measurement waits once for the device. Source: Katende 2025, Thm 3.1, Assumption 4, Thm 5.2 (1); MATH sections 4
    and 7.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Dissipation, RunContext, Snapshot, Trace
        >>> trace = Trace(length=100)
        >>> for step in range(60):
        ...     trace.record(step, torch.tensor(2 + 0.75**step, dtype=torch.float64))
        >>> metric, net = Dissipation(), torch.nn.Linear(1, 1)
        >>> metric.update(Snapshot(step=59, module=net, replay=lambda: net.bias.sum(), run=RunContext(series=trace)))
        >>> round(float(metric.compute()["stability/dissipation"]), 6)
        0.25
        >>> def penalty(module):
        ...     return 1e-3 * sum(p.abs().sum() for p in module.parameters())
        >>> Phi = Dissipation(energies={"objective": lambda module, loss: loss + penalty(module)})
    """

    name = "dissipation"
    patient = True
    keys = tuple(f"stability/{key}" for key in KEYS[:ALWAYS])
    optional = tuple(f"stability/{key}" for key in KEYS[ALWAYS:])
    #: Steps that must be known.
    least = 60
    values: Tensor
    origin: Tensor

    def __init__(
        self,
        length: int = 400,
        *,
        energies: Mapping[str, Energy | str] | None = None,
        reference: str | Path | None = None,
        state: str | None = None,
    ):
        super().__init__()
        self.recorded = self.length = whole("length", length, self.least, instead=" of steps")
        if state is not None and not isinstance(state, str):
            raise ValueError(f"state={state!r}: give the name of the module whose output is the state, '' for the root")
        self.final_state = state
        self.reference = reference if reference in (None, "initial") else existing_file("reference", reference)
        found: dict[str, Energy] = {} if self.reference is None else {"distance": self._distance}
        if state is not None:
            found["state"] = _of_state
        #: What follows from the others.
        self.derived = ("joint",) if len(found) == 2 else ()
        for name, one in _mapping(energies).items():
            if name in (*found, *self.derived):
                raise ValueError(f"energies={{{name!r}: ...}}: with state and reference that is an energy of its own")
            found[name] = _energy(name, one, state)
        self.energies = found
        self._sketch = Sketch(keep=True)
        self._there: Tensor | None = None
        unknown = torch.full((len(KEYS),), torch.nan, dtype=torch.float64)
        for name in ("loss", *found, *self.derived):
            self.add_state(_row(name), default=unknown, persistent=True)
        self.add_state("origin", default=NOWHERE, persistent=True)

    def _distance(self, module: nn.Module) -> Tensor:
        here = position(module, self._sketch)
        if self._there is None:
            if bool(self.origin.isnan().any()):
                first = self.reference == "initial"
                self.origin = (here if first else position_in(str(self.reference), module, self._sketch)).cpu()
            self._there = self.origin.to(here.device)
        return squared_distance(here, self._there)

    def check(self, snapshot: Snapshot) -> None:
        if self.final_state is None:
            return
        submodule(snapshot.module, self.final_state)
        if snapshot.compiled:
            raise Unmeasurable(
                f"state={self.final_state!r}: hooks do not see into compiled modules; train without torch.compile, or "
                "leave state out"
            )

    @property
    def least_steps(self) -> int:
        return self.least

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        return {"trace": beside(snapshot, calls=200)}

    def path(self, snapshot: Snapshot) -> str:
        return "time series"

    def wait(self, snapshot: Snapshot) -> int:
        unknown = snapshot.run.series is None or snapshot.run.series.sparse
        return 0 if unknown else max(0, self.least - len(snapshot.run.series or ()))

    def update(self, snapshot: Snapshot) -> None:
        """Fits the last steps."""
        self.complete = False
        trace = snapshot.run.series
        if trace is None or trace.sparse:
            raise Unmeasurable(
                "the steps before are not known: call Monitor.observe or Monitor.record at every optimizer step, "
                "or pass Snapshot(run=RunContext(series=...))"
            )
        series = trace.read(snapshot.run.ranks)
        failed = set().union(
            *snapshot.run.ranks.gather(lambda: set(trace.failed), "energies that failed")
        )  # which was said
        if "joint" in self.derived:
            series["joint"] = series["state"] + series["distance"] / 2
            failed |= {"joint"} if failed & {"state", "distance"} else set()
        found: dict[str, Tensor] = {}
        for name in ("loss", *self.energies, *self.derived):
            if name in failed:
                found[name] = torch.full((len(KEYS),), torch.nan, dtype=torch.float64)
                continue
            if bool(series["loss"].isnan().all()):
                raise Unmeasurable("the loss of the steps was not seen: in your own loop call Watch.record(loss)")
            try:
                fit = dissipation(series[name][-self.length :])
            except Unmeasurable as error:
                if name == "loss":
                    raise Unmeasurable(f"{name}: {error}") from None
                found[name] = torch.full((len(KEYS),), torch.nan, dtype=torch.float64)  # the others go on
                continue
            row = [fit.gamma, fit.increases, fit.lower, fit.upper, fit.floor, fit.floor_error]
            found[name] = torch.stack([scalar(value) for value in row])
        for name, values in found.items():
            setattr(self, _row(name), values)
        self.complete = True

    def compute(self) -> dict[str, Tensor]:
        """The last fit; bounds and floors that do not exist are left out."""
        found: dict[str, Tensor] = {}
        for name in ("loss", *self.energies, *self.derived):
            for index, (key, value) in enumerate(zip(KEYS, getattr(self, _row(name)))):
                if index < ALWAYS or not bool(value.isnan()):
                    found[f"stability/{key}" + f"_of/{name}" * (name != "loss")] = value
        return found

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._there = None  # it is what the state says


def _row(energy: str) -> str:
    """The state that holds what is known of an energy."""
    return "values" if energy == "loss" else f"values_of/{energy}"


def _of_state(module: nn.Module, state: Tensor) -> Tensor:
    """``0.5 ||X_L||^2``, the mean over samples."""
    return norm(state.float() if state.element_size() < 4 else state).square() / (2 * len(state))


def _mapping(energies: Any) -> Mapping[str, Any]:
    if energies is None:
        return {}
    if not isinstance(energies, Mapping) or not all(isinstance(name, str) and name for name in energies):
        raise ValueError(f"energies={energies!r}: give functions by name, {{'name': function of the module}}")
    for name in energies:
        if name in ("loss", "lr") or "/" in name:
            raise ValueError(f"energies={{{name!r}: ...}}: give another name, without '/', and not loss or lr")
    return energies


def _energy(name: str, energy: Any, state: str | None) -> Energy:
    found = imported(energy) if isinstance(energy, str) else energy
    if not callable(found):
        raise ValueError(f"energies={{{name!r}: {energy!r}}}: give a function of the module, or its import path")
    parameters_of(name, found, state)
    return found
