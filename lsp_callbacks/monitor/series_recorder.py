"""What is recorded at every step, measured or not, for the quantities of a time series."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.monitor.selected_quantities import SelectedQuantities
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.series import Trace


class Recorder:
    """Records loss, learning rate and energies of every step, if a quantity asks for them.

    Args:
        quantities: that are measured.
        errors: what happens if an energy fails.

    Attributes:
        trace: of the last steps; None if no quantity asks for it.
    """

    def __init__(self, quantities: SelectedQuantities, errors: ErrorPolicy):
        self.quantities, self.errors = quantities, errors
        length = max((quantity.recorded for quantity in quantities.all), default=0)
        energies = {name: energy for quantity in quantities.all for name, energy in quantity.energies.items()}
        state = next((q.final_state for q in quantities.all if q.final_state is not None), None)
        self.trace = Trace(length, energies, state=state) if length else None

    def reset(self) -> None:
        """Forget everything."""
        if self.trace is not None:
            self.trace.reset()

    def begin(self, module: nn.Module, *, first: bool = True) -> None:
        """Prepare for a forward pass in training; only energies that look at the network's state need it.

        Args:
            module: that is trained.
            first: whether it is the first micro-batch of a step.
        """
        if self.trace is not None and self._is_wanted:
            with self.errors.warn_instead_of_raise("the final state of the step cannot be seen"):
                self.trace.begin(module, first=first)

    def record(
        self,
        step: int,
        loss: Tensor | None,
        optimizer: torch.optim.Optimizer | None,
        module: nn.Module,
        *,
        previous: int | None = None,
    ) -> None:
        """Record loss, learning rate and energies of a step, before its update, if any quantity asks for them.

        A loop calls it at every step, on all ranks, with the loss of the whole step, or None if it does not know it;
        `Monitor.observe` does so with the snapshot's own loss if nobody else did. It never waits for the device. For
        ``previous`` see `Snapshot`.
        """
        if self.trace is not None and self._is_wanted:
            lr = math.nan if optimizer is None else largest_learning_rate(optimizer)
            with self.errors.warn_instead_of_raise(f"what is recorded at each step could not be at step {step}"):
                self.trace.record(step, loss, lr=lr, module=module, previous=previous)
            for name, error in self.trace.failed.items():
                self.errors.warn_once(f"the energy {name} is not recorded any more, it raised {error}")

    @property
    def _is_wanted(self) -> bool:
        return any(quantity.recorded for quantity in self.quantities.values())

    def drop_unused(self) -> None:
        """Record no more what only quantities that are skipped have asked for."""
        if self.trace is not None:
            rest = self.quantities.values()
            asked = {name for quantity in rest for name in quantity.energies}
            self.trace.drop(self.trace.energies.keys() - asked, state=all(q.final_state is None for q in rest))

    def close(self) -> None:
        """Leave nothing in the module when training ends."""
        if self.trace is not None:
            self.trace.close()
