"""Rate at which the loss, and other energies, fall along a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.dissipation import DissipationResult, dissipation
from lsp_callbacks.linalg import Sketch, norm
from lsp_callbacks.operators.cost import beside
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.key import PREFIX, Key, standard_error
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


class Dissipation(Quantity):
    """Share of its excess over the floor that an energy loses in each step: ``1 - q`` of ``E_{t+1} = q E_t + c``.

    The energies are those of the step before its update. One is the loss of the step; with ``reference`` another is
    ``||theta - theta_ref||^2``, called "distance", the energy of SGD's law; with ``state`` another is the mean over the
    samples of ``0.5 ||X_L||^2``, called "state"; with both there is "joint", ``0.5 (||X_L||^2 + ||theta -
    theta_ref||^2)``; ``energies`` adds the user's own. For ``theta+ = theta - lr (lambda theta + noise)`` the energy
    ``theta^2`` has ``q = (1 - lr lambda)^2``. Above 0 the energy falls to its floor, by e in ``1 / gamma`` steps; at 0
    nothing dissipates; below 0 it grows.

    The loss of a mini-batch carries the noise of its own batch, which moves gamma towards 1, most on a plateau: read
    the bounds, which allow for that, and are absent where the data do not determine them. See `functional.dissipation`.

    "joint" is the quadratic energy of the state ``(X_L, theta)`` in Thm 3.1 and Assumption 3, with both constants 1/2,
    and "state" that of the forward pass in 6.6. There parameters are fixed and it falls with depth; here it is a series
    over training. It does not bound theta, so it alone is no energy in the sense of Assumption 3, for which 6.6 uses
    it. It falls to the outputs that the data require, and samples differ between batches: floor and noise contain both.
    6.6's objective ``Phi = L + R`` of a proximal step is an energy of the user, as in the example; the paper's
    ``-c ||theta+ - theta||^2`` is less than Assumption 4 requires.

    Katende's Thm 3.1 requires a coercive energy with ``E(S+) - E(S) <= -gamma (||X_L||^2 + ||theta||^2) + R``, and
    claims that it exists if and only if all sensitivities stay bounded. As printed, the claim that bounded
    sensitivities are sufficient is false: those of the identity ``theta+ = theta`` are bounded by 1, and no energy
    falls. It stays false with ``theta - theta*`` instead of theta, which is needed for minima other than 0. What holds:
    where some energy between two multiples of ``||theta - theta*||^2`` falls by a factor below 1 in each step, the
    distance falls geometrically, to the floor of the noise. That factor is measured, along this run alone.

    Args:
        length: largest number of last steps that the fit uses.
        energies: by name, functions of the module, or their import paths. Each returns one number from the parameters.
            They are called at every step, so they should be cheap, draw no random numbers and change nothing. A further
            parameter ``loss`` receives the step's loss, and ``state`` X_L, ``(samples, ...)`` without a graph; under
            accumulation that of each micro-batch, and the mean, weighted by samples, is recorded.
        reference: "initial" for the parameters at the first recorded step, or the path of a checkpoint. The distance is
            computed from a random sketch, to 6 %; that takes a byte for each parameter, and some passes over them at
            each step.
        state: name of the module whose output is X_L, the last features or the logits, as in ``named_modules``; "" is
            the root. It must return one tensor and be called once for each batch, in training mode; otherwise the
            energies that need it are NaN, with the reason. A hook keeps a copy of the output until the update.

    The first measurement needs 60 steps. A resumed run continues the series and measures as if it had not been
    interrupted. Under DDP each process has its own series, which continues only with the numbers that all had exchanged
    at the last measurement, if that was the last step before the checkpoint; otherwise it begins anew.

    Raises:
        ValueError: for an argument out of its range; for an energy with an unknown parameter, or that needs the state
            without ``state``.

    Cost: at each step a copy of some numbers and the energies, that of ``reference`` about half a gradient; a
    measurement synchronises once with the device.

    Source: Katende 2025, Thm 3.1, Assumption 4, Thm 5.2 (1); docs/theory.md, sections The Learning Stability
    Profile; The law of SGD, energies, kinks.

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
    KEYS: ClassVar = {
        "dissipation": Key(
            "Share of its excess over the floor that the loss loses in a step.",
            "1 / step",
            "Below 0 the loss grows: lower the learning rate. Near 0 it does not fall: try a lower rate, or a larger "
            "one if the loss still creeps down.",
        ),
        "energy_increases": Key("Share of steps in which the loss rose."),
        "dissipation_lower": Key("One-sided 90 % lower bound of dissipation.", "1 / step", optional=True),
        "dissipation_upper": Key("One-sided 90 % upper bound of dissipation.", "1 / step", optional=True),
        "dissipation_floor": Key(
            "Level at which the loss comes to rest; absent where it does not fall.",
            "loss",
            "If too high: a lower learning rate, or larger batches.",
            optional=True,
        ),
        "dissipation_floor_error": standard_error("dissipation_floor", "loss", optional=True),
        "dissipation_of/<energy>": Key("The same for another energy.", "1 / step"),
        "energy_increases_of/<energy>": Key("Share of steps in which another energy rose."),
        "dissipation_lower_of/<energy>": Key("One-sided 90 % lower bound for another energy.", "1 / step"),
        "dissipation_upper_of/<energy>": Key("One-sided 90 % upper bound for another energy.", "1 / step"),
        "dissipation_floor_of/<energy>": Key("Level at which another energy comes to rest.", "energy"),
        "dissipation_floor_error_of/<energy>": Key("Standard error of that level.", "energy"),
    }
    #: Steps before the first measurement.
    least = 60
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
        recorded: dict[str, Energy] = {} if self.reference is None else {"distance": self._distance}
        if state is not None:
            recorded["state"] = _of_state
        #: Energies that are computed from the recorded ones.
        self.derived = ("joint",) if len(recorded) == 2 else ()
        for name, energy in _mapping(energies).items():
            if name in (*recorded, *self.derived):
                raise ValueError(
                    f"energies={{{name!r}: ...}}: this name is used by the energies of state and reference; choose "
                    "another"
                )
            recorded[name] = _energy(name, energy, state)
        self.energies = recorded
        self._sketch = Sketch(keep=True)
        self._there: Tensor | None = None
        for energy_name in (*recorded, *self.derived):
            for key in NUMBERS:
                self.add_state(_key(key, energy_name), default=scalar(torch.nan), persistent=True)
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
                f"state={self.final_state!r}: hooks cannot read the outputs inside of compiled modules; train without "
                "torch.compile, or without state"
            )

    @property
    def least_steps(self) -> int:
        return self.least

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        return {"trace": beside(snapshot, calls=200)}

    def path(self, snapshot: Snapshot) -> str:
        return "time series"

    def warm_up(self, snapshot: Snapshot) -> int:
        unrecorded = snapshot.run.series is None or snapshot.run.series.sparse
        return 0 if unrecorded else max(0, self.least - len(snapshot.run.series or ()))

    def update(self, snapshot: Snapshot) -> None:
        """Fit the last steps."""
        self.complete = False
        trace = snapshot.run.series
        if trace is None or trace.sparse:
            raise Unmeasurable(
                "the losses of the steps before were not recorded: call Monitor.observe or Monitor.record at every "
                "optimizer step, or pass Snapshot(run=RunContext(series=...))"
            )
        series = trace.read(snapshot.run.ranks)
        # A warning was already issued for each of them.
        failed = set().union(*snapshot.run.ranks.gather(lambda: set(trace.failed), "energies that failed"))
        if "joint" in self.derived:
            series["joint"] = series["state"] + series["distance"] / 2
            failed |= {"joint"} if failed & {"state", "distance"} else set()
        fits: dict[str, DissipationResult | None] = {}
        for name in ("loss", *self.energies, *self.derived):
            fits[name] = None
            if name in failed:
                continue
            if bool(series["loss"].isnan().all()):
                raise Unmeasurable("the losses of the steps were not seen: in your own loop call Watch.record(loss)")
            try:
                fits[name] = dissipation(series[name][-self.length :])
            except Unmeasurable as error:
                if name == "loss":
                    raise Unmeasurable(f"{name}: {error}") from None  # other energies become NaN instead
        for name in (*self.energies, *self.derived):
            for key, value in _numbers(fits[name]).items():
                setattr(self, _key(key, name), scalar(value))
        self.finish(_numbers(fits["loss"]))

    def compute(self) -> dict[str, Tensor]:
        """Return the last fit; bounds and floors that do not exist are left out."""
        values = super().compute()
        for name in (*self.energies, *self.derived):
            for key in NUMBERS:
                value = getattr(self, _key(key, name))
                if PREFIX + key in self.keys or not bool(value.isnan()):
                    values[_key(key, name)] = value
        return values

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._there = None  # read again from the state


#: Numbers of the fit of each energy.
NUMBERS = tuple(name for name in Dissipation.KEYS if "/" not in name)


def _key(number: str, energy: str) -> str:
    """Return the key, and the state, of a number of an energy other than the loss."""
    return f"{PREFIX}{number}_of/{energy}"


def _numbers(fit: DissipationResult | None) -> dict[str, float | Tensor]:
    """Return the numbers of a fit by name; NaN where there is none."""
    if fit is None:
        return dict.fromkeys(NUMBERS, torch.nan)
    numbers = (fit.gamma, fit.increases, fit.lower, fit.upper, fit.floor, fit.floor_error)
    return dict(zip(NUMBERS, numbers))


def _of_state(module: nn.Module, state: Tensor) -> Tensor:
    """Return ``0.5 ||X_L||^2``, the mean over samples."""
    return norm(state.float() if state.element_size() < 4 else state).square() / (2 * len(state))


def _mapping(energies: Any) -> Mapping[str, Any]:
    if energies is None:
        return {}
    if not isinstance(energies, Mapping) or not all(isinstance(name, str) and name for name in energies):
        raise ValueError(f"energies={energies!r}: give functions by name, {{'name': function of the module}}")
    for name in energies:
        if name in ("loss", "lr") or "/" in name:
            raise ValueError(f"energies={{{name!r}: ...}}: give another name, without '/', other than loss and lr")
    return energies


def _energy(name: str, energy: Any, state: str | None) -> Energy:
    function = imported(energy) if isinstance(energy, str) else energy
    if not callable(function):
        raise ValueError(f"energies={{{name!r}: {energy!r}}}: give a function of the module, or its import path")
    parameters_of(name, function, state)
    return function
