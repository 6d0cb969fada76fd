"""The quantities that a run measures, and why others are skipped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from lsp_callbacks.autograd.gathered_layer import gathered
from lsp_callbacks.errors import NotApplicable, Unmeasurable
from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.monitor.invalidation import lost_keys
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.step.players import require_one
from lsp_callbacks.step.snapshot import Snapshot

#: Names of quantities by the reason for which they are skipped.
Reasons = Mapping[str, list[str]]


@dataclass
class Skips:
    """Quantities that cannot be measured, by the reason.

    Attributes:
        warned: those that the user is told of.
        silent: those that do not apply to this model.
    """

    warned: dict[str, list[str]] = field(default_factory=dict)
    silent: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, error: Unmeasurable) -> None:
        """Add a quantity that has raised an error."""
        reasons = self.silent if isinstance(error, NotApplicable) else self.warned
        reasons.setdefault(str(error), []).append(name)

    def __iter__(self) -> Iterator[tuple[Reasons, bool]]:
        """Return the reasons of each kind, with whether the user is told."""
        return iter([(self.silent, False), (self.warned, True)])


def warn_of_skips(reasons: Reasons, *, stacklevel: int) -> None:
    """Issue one warning for all quantities that are skipped."""
    text = "; ".join(f"{' and '.join(names)} ({reason})" for reason, names in reasons.items())
    warnings.warn(f"lsp_callbacks skips {text}", stacklevel=stacklevel)


class SelectedQuantities(dict[str, Quantity]):
    """The quantities that are measured, by name.

    Args:
        quantities: all that were asked for.
        named: names of those that the user named; the others may be skipped with a warning.
        strict: whether all that apply to the model must be measured.

    Attributes:
        skipped: the reason for which a quantity is not measured, by its name.
    """

    def __init__(self, *quantities: Quantity, named: Collection[str], strict: bool):
        self.all, self.named, self.strict = quantities, set(named), strict
        self.skipped: dict[str, str] = {}
        super().__init__()

    def reset(self) -> None:
        """Reset all quantities, and measure all of them again."""
        for quantity in self.all:
            quantity.reset()
        self.clear()
        self.update({quantity.name: quantity for quantity in self.all})
        self.skipped.clear()
        self._begun = False

    def begin(self, snapshot: Snapshot, errors: ErrorPolicy) -> None:
        """Show the quantities the weights at the first step of a run, before any update."""
        if snapshot.step == 0 and not self._begun:
            self._begun = True
            ranks = snapshot.run.ranks
            for name, quantity in self.items():
                with errors.warn_instead_of_raise(f"{name} could not look at the weights that the run begins with"):
                    if snapshot.run.shards is None:
                        quantity.begin(snapshot.module)
                    elif type(quantity).begin is not Quantity.begin:
                        ranks.together(partial(_begin_gathered, quantity, snapshot))

    @property
    def longest(self) -> int:
        """Steps that a measurement of everything takes."""
        return max((quantity.prepare + quantity.window for quantity in self.values()), default=1)

    def possible_keys(self, *, optional: bool = True, without_update: bool = False) -> set[str]:
        """Return the global keys that can appear.

        Args:
            optional: whether those are included that not every model has.
            without_update: whether the update turned out not to be the optimizer's.
        """
        keys = {key for q in self.values() for key in (*q.keys, *(q.optional if optional else ()))}
        lost = {*lost_keys(self.values())} if without_update else set()
        return keys - lost - {PREFIX + name for name in self.skipped}

    def awaiting(self) -> set[str]:
        """Return the names of those that have begun and wait for the update of their step."""
        return {name for name, quantity in self.items() if quantity.awaited is not None}

    def forget_vectors(self) -> None:
        """Forget windows and warm starts."""
        for quantity in self.values():
            quantity.load_vectors({})

    def captures_inputs(self, name: str, module: nn.Module) -> bool:
        """Return whether any quantity wants the module's inputs in full."""
        return any(quantity.captures_inputs(name, module) for quantity in self.values())

    def unmeasurable(self, snapshot: Snapshot, *, steps: float = math.inf) -> Skips:
        """Return the quantities that cannot be measured on such steps; nothing is replayed.

        Args:
            snapshot: a step of the run that begins.
            steps: how many the run will take, as far as that is known.

        Raises:
            Unmeasurable: if a quantity that must be measured is among them.
        """
        skips = Skips()
        for name, quantity in self.items():
            try:
                _check(quantity, snapshot, steps)
                if quantity.without_update:
                    self.add_unknown(quantity, snapshot, skips)
            except Unmeasurable as error:
                if name in self.named or (self.strict and not isinstance(error, NotApplicable)):
                    raise Unmeasurable(f"{name} cannot be measured: {error}") from None
                skips.add(name, error)
        return skips

    def add_unknown(self, quantity: Quantity, snapshot: Snapshot, skips: Skips) -> None:
        """Add the keys that a quantity does not report where the update of a step is not known.

        Raises:
            Unmeasurable: if there are any, and everything must be measured.
        """
        reason = quantity.unknown_update(snapshot)
        lost = [key.removeprefix(PREFIX) for key in lost_keys([quantity])] if reason else []
        for name in lost:
            if name not in self.skipped:
                if self.strict:
                    raise Unmeasurable(str(reason))
                skips.add(name, Unmeasurable(reason))

    def reported_keys(self, quantity: Quantity) -> list[str]:
        """Return the keys of each measurement of a quantity, without those that were skipped."""
        return [key for key in quantity.keys if key.removeprefix(PREFIX) not in self.skipped]

    def skip(self, reasons: Reasons) -> None:
        """Take quantities out; a name may also be a key that a quantity does not report any more."""
        for reason, names in reasons.items():
            for name in names:
                self.skipped[name] = reason
                self.pop(name, None)


def _begin_gathered(quantity: Quantity, snapshot: Snapshot) -> None:
    with snapshot.run.ranks.checked(), gathered(snapshot.module):
        quantity.begin(snapshot.module)


def _check(quantity: Quantity, snapshot: Snapshot, steps: float) -> None:
    if snapshot.run.sharded:
        raise Unmeasurable(snapshot.run.sharded)
    if snapshot.run.shards is not None and quantity.energies:
        raise Unmeasurable(
            "its energies are recorded at every step, for which each process would have to gather all weights each time"
        )
    if not quantity.supports_multiple_optimizers:
        require_one(snapshot.player)
    unknown_loss = snapshot.run.unknown_loss
    if unknown_loss and not quantity.needs_loss and not snapshot.compiled:  # which hooks would compile anew
        unknown_loss = None
    try:
        quantity.check(snapshot)
    except Unmeasurable as error:
        if unknown_loss is None or isinstance(error, NotApplicable):
            raise
    if unknown_loss is not None:
        raise Unmeasurable(unknown_loss)
    if quantity.least_steps > steps:
        raise NotApplicable(
            f"it takes {quantity.least_steps} steps, and the run has {steps}: train longer, or give it a shorter window"
        )
