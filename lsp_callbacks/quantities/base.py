"""What every measured quantity is: a torchmetrics Metric that is given frozen training steps."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric

from lsp_callbacks.operators.curvature.hessian import path_taken
from lsp_callbacks.plots.figure import load
from lsp_callbacks.quantities.key import PREFIX, Key, is_global
from lsp_callbacks.step.energies import Energy
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.taken_step import TakenStep

#: Name, in keys, of what is outside of all submodules.
ROOT = "(root)"


class Quantity(Metric):
    """A Metric whose ``update`` takes a `Snapshot`.

    A subclass states its numbers in ``KEYS``, says what a measurement costs, and measures in ``update``, which ends
    with ``finish``::

        class GradientNorm(Quantity):
            '''Length of the step's gradient.'''

            name = "gradient_norm"
            KEYS = {"gradient_norm": Key("Length of the step's gradient.", "loss / parameter")}

            def cost(self, snapshot):
                return {"gradient": 1.0}

            def update(self, snapshot):
                self.complete = False
                self.finish({"gradient_norm": replayed_gradient(snapshot)[1].norm()})

    One line in `lsp_callbacks.quantities` makes it known by its name: the monitor, its checkpoints, command line and
    YAML files, the report's table, the figure and the documentation take everything else from the class.

    Each global key is a torchmetrics state of that name, float64 and NaN before a measurement; checkpoints hold the
    numbers of the last one as one dict by key. A measurement takes ``prepare + window`` consecutive steps; ``complete``
    says whether the last update finished one. ``update`` computes first and assigns last, so that an exception leaves
    the state whole. States are equal on all ranks, so nothing is reduced when they are computed.

    ``compute`` returns a dict of the last measurement, and so does ``metric(snapshot)``. Lightning logs it by
    ``self.log_dict(metric(snapshot))``, and one key by ``self.log("sharpness", metric["stability/sharpness"])``, where
    ``metric[key]`` is a metric of its own, made once in ``__init__``.

    Attributes:
        name: in ``StabilityMonitor(quantities=...)``.
        KEYS: what is reported, by name, without the common prefix ``stability/``. A name such as
            ``"spectral_norm/<layer>"`` stands for one key a layer.
        keys: the global keys that every measurement returns, NaN where it fails; derived from ``KEYS``.
        optional: further global keys, left out where they are not defined; derived from ``KEYS``.
        key_states: whether each global key is a state; otherwise the class adds its own and overrides ``compute``.
        by_name_only: whether the quantity is too expensive for any preset.
        weight: how fast it moves, beside the others: what ``stability/courant`` leaves of the budget is shared out in
            proportion to ``sqrt(weight * price)``.
        window: consecutive steps that are measured.
        prepare: steps before them.
        needs_update: whether the optimizer's update map enters.
        needs_loss: whether the step is replayed for more than the sizes of what its modules receive; otherwise it is
            also measured where no loss is known, see `RunContext.unknown_loss`.
        without_update: keys that stay right where the update turns out to be another one: then the quantity goes on
            with them alone, on snapshots that are `RunContext.invalidated`, or for which `unknown_update` has a reason.
            Without any it is skipped.
        recorded: steps of the `Trace` that it looks back on, at most; 0 needs none.
        energies: what the trace records beside loss and rate, by name.
        final_state: name of the module whose output the energies receive as ``state``; None where none needs it.
        picture: suffix of the figure's file name and logger tag, or "" for none; neither a key nor the beginning of
            one. ``plot`` without arguments draws it, also after `load_vectors` has forgotten the vectors; it
            returns the figure first, and raises ValueError where there is nothing to show.
        warms_up: whether `warm_up` can ask for more steps; derived.
        reads_graph: whether it has a `reader`: then it comes first at a step, and lets go of what that has kept;
            derived.
        awaited: the step whose update a measurement waits for, which `after_update` completes; None where none does.
        supports_multiple_optimizers: whether the step of a `Player` can be measured; otherwise the quantity is skipped
            where several optimizers take turns.
        needs_whole: whether it looks at the whole parameters where each process holds a shard of them; then every
            process gathers a copy of them, see `Snapshot.whole`.
    """

    name: str = ""
    KEYS: ClassVar[Mapping[str, Key]] = MappingProxyType({})
    keys: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    key_states: bool = True
    by_name_only: bool = False
    weight: float = 0.1
    window: int = 1
    prepare: int = 0
    needs_update: bool = False
    needs_loss: bool = True
    without_update: tuple[str, ...] = ()
    recorded: int = 0
    energies: Mapping[str, Energy] = MappingProxyType({})
    final_state: str | None = None
    picture: str = ""
    warms_up: bool = False
    reads_graph: bool = False
    supports_multiple_optimizers: bool = False
    needs_whole: bool = True
    awaited: TakenStep | None = None
    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.warms_up = cls.warm_up is not Quantity.warm_up
        cls.reads_graph = cls.reader is not Quantity.reader
        if "KEYS" in vars(cls):
            names = {PREFIX + name: key for name, key in cls.KEYS.items() if "/" not in name}
            cls.keys = tuple(name for name, key in names.items() if not key.optional)
            cls.optional = tuple(name for name, key in names.items() if key.optional)
        if "update" in vars(cls):
            cls.update = _takes_a_snapshot(cls.update)  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.complete = False
        for key in (*self.keys, *self.optional) if self.key_states else ():
            self.add_state(key, default=scalar(torch.nan))

    def finish(self, values: Mapping[str, float | Tensor]) -> None:
        """Complete a measurement with its numbers, by the names of ``KEYS``; what is not given becomes NaN.

        Raises:
            KeyError: for a name that ``KEYS`` does not state.
        """
        given = {PREFIX + name: float(value) for name, value in values.items()}
        keys = (*self.keys, *self.optional)
        if not given.keys() <= {*keys}:
            unknown = ", ".join(sorted(given.keys() - {*keys}))
            raise KeyError(f"{type(self).__name__}.KEYS does not state {unknown}")
        numbers = torch.tensor([given.get(key, math.nan) for key in keys], dtype=torch.float64)
        # As setattr does, after a dozen questions for each; torchmetrics forgets its cache in `update` alone.
        vars(self).update(zip(keys, numbers.unbind()), complete=True, _computed=None)

    def compute(self) -> dict[str, Tensor]:
        """Return the last measurement, NaN before one; optional numbers that are not defined are left out."""
        values = {key: getattr(self, key) for key in (*self.keys, *self.optional)}
        return {key: value for key, value in values.items() if key in self.keys or not math.isnan(value)}

    def numbers(self) -> dict[str, float]:
        """Return `compute` as floats, of this rank, and without the cache that torchmetrics keeps of it."""
        return {key: float(value) for key, value in type(self).compute(self).items()}

    def forward(self, snapshot: Snapshot) -> dict[str, Tensor]:  # type: ignore[override]
        """Update with one step and return the last measurement.

        A step has nothing to accumulate; torchmetrics' own ``forward`` would measure from an empty state, without the
        warm starts and the windows that are under way.
        """
        self.update(snapshot)
        values = self.compute()
        self._forward_cache: Any = values
        return values

    def __getitem__(self, key: str) -> CompositionalMetric:  # type: ignore[override]
        """Return the metric of one key, NaN where it is not defined; unlike torchmetrics' own, it can be pickled.

        Raises:
            KeyError: from its ``compute``, for a key that the quantity does not have.
        """
        entry = functools.partial(_number, key, key in (*self.keys, *self.optional))
        entry.__name__ = key  # type: ignore[attr-defined]  # for its repr
        return CompositionalMetric(entry, self, None)

    @property
    def least_steps(self) -> int:
        """Optimizer steps that the first measurement takes."""
        return self.prepare + self.window

    @abstractmethod
    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Return the gradients that the next measurement costs, by what they are spent on; equal entries are shared.

        It is asked before a measurement, the first one included, which may cost more than those after it: from shapes,
        and from what one forward pass was counted to do. In all steps of the window together.

        Passes, and what is beside them: see `lsp_callbacks.operators.cost`. The numbers in the docstrings of quantities
        are those of a large MLP, as ``benchmarks/cost_of_each.py`` measures them. Cost: one forward pass.
        """

    def limit_cost(self, snapshot: Snapshot, gradients: float) -> str | None:
        """Measure with fewer probes, rows or steps from now on, if a measurement would cost more otherwise.

        Called on all ranks before a measurement, and only where `cost` says more; it must come to the same on all. If
        `cost` still says more after it, the quantity is left out.

        Args:
            snapshot: the step.
            gradients: that a measurement may cost.

        Returns:
            In words, what was left out: "32 of 128 rows"; it labels the results, see `Monitor.paths`. None is nothing.
        """
        return None

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        """Return the predicted bytes beside training at the peak of a measurement, by what they are for.

        Equal entries are shared. Cost: one forward pass for all quantities of a step, see
        `lsp_callbacks.operators.memory`.
        """
        return {}

    def check(self, snapshot: Snapshot) -> None:
        """Raise `Unmeasurable` if the quantity cannot be measured on such steps; nothing is replayed."""

    def unknown_update(self, snapshot: Snapshot) -> str | None:
        """Return why nothing but ``without_update`` can be measured on such steps; None where everything can."""
        return None

    def reader(self, module: nn.Module, run: RunContext, step: int) -> GraphReader | None:
        """Return what reads the graph of a step at which a measurement starts; None reads nothing.

        It is handed back in `Snapshot.readers`.
        """
        return None

    @property
    def needs_replay(self) -> bool:
        """Whether the next step has to be kept for a replay; False if what `reader` reads is enough."""
        return True

    def begin(self, module: nn.Module) -> None:
        """Look at the weights before the first update of a run, on all ranks; not called where a run is resumed."""

    def view(self, snapshot: Snapshot) -> Snapshot:
        """Return a step of a module with shards as the quantity looks at it; all ranks ask together."""
        return snapshot.whole if self.needs_whole else snapshot

    def warm_up(self, snapshot: Snapshot) -> int:
        """Return the number of steps until enough is known to measure, 0 for now."""
        return 0

    def _lower(self, setting: str, snapshot: Snapshot, gradients: float) -> str | None:
        """Lower a whole number among the settings until a measurement costs that much, to 1 at least.

        Returns:
            ``"3 of 8"``; None where it was low enough.
        """
        before = getattr(self, setting)
        while getattr(self, setting) > 1 and sum(self.cost(snapshot).values()) > gradients:
            setattr(self, setting, getattr(self, setting) - 1)
        now = getattr(self, setting)
        return None if now == before else f"{now} of {before}"

    def after_update(self) -> None:
        """Complete a measurement that has `awaited` the update of its step, as soon as that was made."""

    def captures_inputs(self, name: str, module: nn.Module) -> bool:
        """Return whether the inputs of a module are to be kept in full."""
        return False

    def path(self, snapshot: Snapshot) -> str:
        """Return in words how the numbers of an update were computed, see `Monitor.paths`.

        "exact", or how the Hessian products were taken where there is a ``method``.
        """
        method = getattr(self, "method", None)
        return "exact" if method is None else path_taken(snapshot, method)

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the global numbers of a measurement, or of several, as torchmetrics draws a dict.

        Args:
            val: a result of ``compute`` or of ``metric(snapshot)``, or a list of such; None takes the last measurement.
            ax: to draw into; None makes a figure.

        Returns:
            The figure and its axes.

        Raises:
            ImportError: without matplotlib.
        """
        if ax is None:  # without pyplot, which would keep the figure
            ax = load("matplotlib.figure").Figure(layout="constrained").subplots()
        values = self.compute() if val is None else val
        self._plot([_global(v) for v in values] if isinstance(values, Sequence) else _global(values), ax)
        if ax.get_legend() is not None:  # torchmetrics puts it across the curves
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return ax.get_figure(), ax

    def vectors(self) -> dict[str, Any]:
        """Return what a measurement remembers beside its scalars; it is saved only with ``save_vectors=True``."""
        return {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        """Take back what `vectors` returned; an empty dict forgets it and drops a window that is under way."""

    def restart(self) -> None:
        """Forget what was remembered of the parameters trained so far, as others are trained from now on."""
        self.load_vectors({})

    def reset(self) -> None:
        """Forget everything, as before the first measurement."""
        super().reset()
        self.complete = False
        self.load_vectors({})

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the states, the numbers by key in one dict of floats, and the number of updates."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        state[prefix + "_update_count"] = torch.tensor(self._update_count)
        if self.key_states:  # one dict: a checkpoint of as many tensors is larger
            numbers = {key: float(getattr(self, key)) for key in (*self.keys, *self.optional)}
            state[prefix + "_numbers"] = {key: value for key, value in numbers.items() if not math.isnan(value)}
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Not by `get_extra_state`: loading a module's checkpoint from before it held this metric would become an error.
        count, numbers = state_dict.pop(prefix + "_update_count", None), state_dict.pop(prefix + "_numbers", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if numbers is not None and self.key_states:
            for key in (*self.keys, *self.optional):
                setattr(self, key, scalar(numbers.get(key, torch.nan)))
        if count is not None:
            self._update_count, self._computed = int(count), None


def _takes_a_snapshot(update: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(update)
    def checked(self: Quantity, snapshot: Snapshot) -> None:
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"{type(self).__name__}.update takes a lsp_callbacks.Snapshot, not a {type(snapshot).__name__}: "
                "Snapshot(step=0, module=module, replay=lambda: loss, optimizer=optimizer), where replay computes the "
                "loss of the step anew"
            )
        update(self, snapshot)

    return checked


def are_measurements(val: Any) -> bool:
    """Return whether a value is a result of `Quantity.compute`, or several, rather than what a picture is drawn of."""
    return isinstance(val, Mapping) or (isinstance(val, list | tuple) and all(isinstance(v, Mapping) for v in val))


def _number(key: str, may_lack: bool, values: Mapping[str, Tensor]) -> Tensor:
    return values.get(key, scalar(math.nan)) if may_lack else values[key]


def _global(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values that are not those of single layers, by the last part of their keys: one axis shows few."""
    return {key.split("/")[1]: value for key, value in values.items() if is_global(key)}


def scalar(value: float | Tensor) -> Tensor:
    """Return a number as a state: float64, on the CPU, without a graph."""
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
