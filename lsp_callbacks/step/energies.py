"""Energies of the steps: functions of the user's that are evaluated at every step, before its update."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lsp_callbacks.step.module_output import FinalState

#: A function of the module, cheap and without side effects. Parameters called ``loss`` and ``state`` are given the
#: step's loss and its final state.
Energy = Callable[..., Tensor]
PARAMETERS = ("loss", "state")


def parameters_of(name: str, energy: Energy, state: str | None) -> frozenset[str]:
    """Return which of `PARAMETERS` an energy takes beside the module, by the names of its parameters.

    Args:
        name: name of the energy, for messages.
        energy: the function.
        state: name of the module whose output is the state; None if it is not known.

    Raises:
        ValueError: for a function without a parameter, one with further ones that have neither these names nor
            defaults, or one that takes a state that is not known.
    """
    try:
        signature = list(inspect.signature(energy).parameters.values())
    except (TypeError, ValueError):  # written in C: it takes the module
        return frozenset()
    named = [p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    module = [p for p in named if p.kind is not p.KEYWORD_ONLY][:1]
    if (not module and len(named) == len(signature)) or any(p.name in PARAMETERS for p in module):
        raise ValueError(
            f"energies={{{name!r}: ...}}: its first parameter is the module: def {name}(module, loss, state)"
        )
    rest = [p for p in named if p not in module]
    for p in rest:
        if (p.name not in PARAMETERS and p.default is p.empty) or (
            p.name in PARAMETERS and p.kind is p.POSITIONAL_ONLY
        ):
            raise ValueError(
                f"energies={{{name!r}: ...}}: nothing is known of its parameter {p.name!r}: beside the module it may "
                "take 'loss' and 'state', by these names; give others a default, or bind them with functools.partial"
            )
    taken = frozenset(p.name for p in rest if p.name in PARAMETERS)
    if "state" in taken and state is None:
        raise ValueError(
            f"energies={{{name!r}: ...}} asks for the state: name the module whose output that is, state='head', or '' "
            "for the root"
        )
    return taken


class Energies:
    """Evaluates energies at the parameters of a step. One that raises is NaN from then on.

    Args:
        energies: by name, called with the module under ``no_grad``.
        state: name of the module whose output is the final state, see `FinalState`; None if no energy takes it.

    Attributes:
        final: looks at the final state; None if no energy takes it.
        failed: energies that raised, and what.

    Raises:
        ValueError: see `parameters_of`.
    """

    def __init__(self, energies: Mapping[str, Energy], state: str | None):
        self.energies = dict(energies)
        self.final = None if state is None else FinalState(state)
        self._parameters = {name: parameters_of(name, energy, state) for name, energy in self.energies.items()}
        self.reset()

    def reset(self) -> None:
        """Evaluate all energies again."""
        self.close()
        self.failed: dict[str, str] = {}
        self._dropped: set[str] = set()
        self._state_dropped = False

    def begin(self, module: nn.Module, *, first: bool) -> None:
        """Look at the final state in the forward pass that comes next; for the arguments see `FinalState.begin`."""
        if self.final is not None and not self._state_dropped:
            self.final.begin(module, first=first)

    def drop(self, names: Iterable[str], *, state: bool) -> None:
        """Evaluate some energies no more; they are NaN from now on.

        Args:
            names: of the energies.
            state: whether no energy takes the final state any more.
        """
        self._dropped |= set(names)
        if state:
            self.close()
            self._state_dropped = True

    def close(self) -> None:
        """Remove the hook that looks at the final state."""
        if self.final is not None:
            self.final.close()

    def values(self, module: nn.Module | None, loss: Tensor | None) -> dict[str, Any]:
        """Return the energies of a step; NaN for those that failed or were dropped, or whose loss is not known."""
        return {name: self._value(name, module, loss) for name in self.energies}

    def _value(self, name: str, module: nn.Module | None, loss: Tensor | None) -> Any:
        taken = self._parameters[name]
        if name in self.failed or name in self._dropped or ("loss" in taken and loss is None):
            return math.nan
        settings = {"loss": loss.detach()} if "loss" in taken and loss is not None else {}
        try:
            if "state" not in taken or self.final is None:
                return self.energies[name](module, **settings)
            states = self.final.states()
            parts = [self.energies[name](module, state=state, **settings) for state in states]
            if len(parts) == 1:
                return parts[0]
            return sum(len(state) * part for state, part in zip(states, parts)) / sum(map(len, states))
        except Exception as error:  # whatever the user's function raises
            self.failed[name] = f"{type(error).__name__}: {error}"
            return math.nan
