"""What every measured quantity is: a torchmetrics Metric that is fed frozen training steps."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lsp_callbacks.operators.curvature.hessian import path_taken
from lsp_callbacks.plots.stability_diagram import matplotlib
from lsp_callbacks.step.energies import Energy
from lsp_callbacks.step.snapshot import Snapshot

#: In keys, the name of what is outside of all submodules.
ROOT = "(root)"


class Quantity(Metric):
    """A Metric whose ``update`` takes a `Snapshot`.

    A measurement takes ``prepare + window`` consecutive steps; ``complete`` says whether the last update finished one.
    ``update`` computes first and assigns last, so that an exception leaves the state whole. States are equal on all
    ranks, so nothing is reduced when they are computed.

    ``compute`` returns a dict of the last measurement, and so does ``metric(snapshot)``. Lightning logs it by
    ``self.log_dict(metric(snapshot))``, and one key by ``self.log("sharpness", metric["stability/sharpness"])``, where
    ``metric[key]`` is a metric of its own, made once in ``__init__``.

    Attributes:
        name: in ``StabilityMonitor(quantities=...)``.
        keys: the global scalars that ``compute`` returns, NaN where a measurement fails.
        optional: further ones, left out where they are not defined; keys with a second "/" are per layer.
        window: consecutive steps that are measured.
        prepare: steps before them.
        needs_update: whether the optimizer's update map enters.
        without_update: keys that stay right where the update turns out to be another one: then the quantity goes on
            with them alone, on snapshots that are `RunContext.invalidated`. Without any it is left out.
        recorded: steps of the `Trace` that it looks back on, at most; 0 asks for none.
        energies: what the trace is to record beside loss and rate, by name.
        final_state: name of the module whose output the energies see as ``state``; None where none asks for it.
        picture: what ``plot`` shows at the end of a run, as a name for files and loggers, where it is neither a key nor
            the beginning of one; empty without a picture. Such a ``plot`` needs no argument, keeps what it shows when
            `load_vectors` forgets, returns a figure first, and raises ValueError where there is nothing to show.
        patient: whether `wait` is asked before a measurement.
        plays: whether a `Player`'s step can be measured; otherwise the quantity is left out of games.
    """

    name: str = ""
    keys: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    window: int = 1
    prepare: int = 0
    needs_update: bool = False
    without_update: tuple[str, ...] = ()
    recorded: int = 0
    energies: Mapping[str, Energy] = MappingProxyType({})
    final_state: str | None = None
    picture: str = ""
    patient: bool = False
    plays: bool = False
    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):
            cls.update = _takes_a_snapshot(cls.update)  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.complete = False

    def forward(self, snapshot: Snapshot) -> dict[str, Tensor]:  # type: ignore[override]
        """Update with one step, and return the last measurement: of a step there is nothing to accumulate.

        torchmetrics' own would measure from an empty state, which forgets warm starts and windows under way.
        """
        self.update(snapshot)
        self._forward_cache = values = self.compute()
        return values

    @property
    def least_steps(self) -> int:
        """Optimizer steps that the first measurement takes."""
        return self.prepare + self.window

    @abstractmethod
    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Gradients that one measurement costs, by what they are spent on; equal entries are shared.

        Passes, and what is beside them: see `lsp_callbacks.operators.cost`. The numbers in the docstrings of quantities
        are those of a large MLP, as ``benchmarks/cost_of_each.py`` measures them. Cost: one forward pass.
        """

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        """Bytes beside training at the peak of a measurement, predicted, by what they are for; equal ones are shared.

        Cost: one forward pass for all quantities of a step, see `lsp_callbacks.operators.memory`.
        """
        return {}

    def check(self, snapshot: Snapshot) -> None:
        """Raises `Unmeasurable` if the quantity cannot be measured on such steps; replays nothing."""

    def begin(self, module: nn.Module) -> None:
        """Called on all ranks when a run begins, not where it is resumed: the weights have not moved yet."""

    def wait(self, snapshot: Snapshot) -> int:
        """Steps until enough is known to measure, 0 for now; until then a `patient` quantity says nothing."""
        return 0

    def keeps(self, name: str, module: nn.Module) -> bool:
        """Whether the module's inputs are to be kept in full."""
        return False

    def path(self, snapshot: Snapshot) -> str:
        """By which way the numbers of an update were found, for the user to read: see `Monitor.paths`.

        "exact", or the way of the Hessian products where it takes a ``method``.
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
            ModuleNotFoundError: without matplotlib.
        """
        if ax is None:  # without pyplot, which would keep the figure
            ax = matplotlib("matplotlib.figure").Figure(layout="constrained").subplots()
        values = self.compute() if val is None else val
        self._plot([_global(v) for v in values] if isinstance(values, Sequence) else _global(values), ax)
        if ax.get_legend() is not None:  # torchmetrics puts it across the curves
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return ax.get_figure(), ax

    def vectors(self) -> dict[str, Any]:
        """What a measurement remembers beside its scalars; saved only with ``save_vectors=True``."""
        return {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        """Takes back what `vectors` gave; nothing forgets it, and drops a window that is under way."""

    def restart(self) -> None:
        """Called where other parameters are trained from now on: what was remembered of the earlier ones is let go."""
        self.load_vectors({})

    def reset(self) -> None:
        super().reset()
        self.complete = False
        self.load_vectors({})

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The states and, unlike torchmetrics', how many updates they saw."""
        state = super().state_dict(*args, **kwargs)
        state[kwargs.get("prefix", "") + "_update_count"] = torch.tensor(self._update_count)
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        count = state_dict.pop(prefix + "_update_count", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
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


def is_global(key: str) -> bool:
    """Whether it is of the whole network, not of a layer: ``stability/<name>``."""
    return key.count("/") == 1


def _global(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values without those of single layers, as one axis cannot show a hundred, by the last part of their keys."""
    return {key.split("/")[1]: value for key, value in values.items() if is_global(key)}


def scalar(value: float | Tensor) -> Tensor:
    """A number as a state: float64, on the CPU, without a graph."""
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
