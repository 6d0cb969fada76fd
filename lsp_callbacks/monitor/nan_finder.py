"""What made the first NaN or Inf of a run: a look at every step before its update; knows of no training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import foreach_norm, sparse_values
from lsp_callbacks.autograd.shifted_parameters import restored
from lsp_callbacks.autograd.side_effects import TorchRandomState, muted, untouched
from lsp_callbacks.functional.numerics.first_fault import Fault, first_fault
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.training_loop import TrainingLoop
from lsp_callbacks.quantities.numerics.numerics import Numerics
from lsp_callbacks.step.batch import MicroBatch
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.replay import copied

MOVED_BEFORE = "an earlier update of the same batch has moved the parameters"


class NanFinder:
    """Finds out what made the first NaN or Inf of a run, if `Numerics` is among what is measured.

    At each step one norm over loss and gradient is read, the only wait for the device. The first time that it is not
    finite, the step is replayed once, at the parameters that it had (the update comes later), under
    `lsp_callbacks.functional.numerics.first_fault`; afterwards nothing is replayed any more. Until then the step's
    batches are kept by reference, with torch's random state. The copy of the module is made at the fault only: so its
    buffers and attributes are as the step left them, a batch that the step changed in place is as it left it, and
    numbers drawn from numpy or Python are others. If the replay is finite, or fails, the `Fault` says so.

    Several ranks all look at the gradient, which is the same on each, and the first that finds a fault reports it; a
    loss that is not finite while the gradient is finite is looked at with one rank only.

    Args:
        monitor: that measures `Numerics`; if it does not, nothing is done.

    Cost: one reduction over the gradient a step.
    """

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self._parts: list[MicroBatch] = []

    @property
    def numerics(self) -> Numerics | None:
        """The quantity that reports the fault; None if it is not measured."""
        quantity = self.monitor.quantities.get(Numerics.name)
        return quantity if isinstance(quantity, Numerics) else None

    def add(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor | None], *, first: bool) -> None:
        """Add a micro-batch whose forward pass comes next.

        Args:
            batch: as the step will receive it.
            loss: as the step will differentiate it.
            first: whether it is the first of a step; those of the step before are forgotten.
        """
        if first:
            self._parts = []
        self._parts.append(MicroBatch(batch, loss, TorchRandomState()))

    def saw_loss(self, loss: Tensor) -> None:
        """Note the loss of the last micro-batch; it may hold a factor."""
        if self._parts:
            self._parts[-1].step_loss = loss.detach()

    def look(
        self, step: int, loop: TrainingLoop, optimizer: torch.optim.Optimizer, *, overflowed: bool, again: bool
    ) -> Fault | None:
        """Return the fault if this step is the first that is not finite; its gradient is complete.

        Args:
            step: number of the update.
            loop: that trains.
            optimizer: that will make the update.
            overflowed: whether a gradient scaler will leave the update out, as scaled gradients have overflowed: that
                is no fault, unless the loss itself is not finite.
            again: whether the same batch has made an update before.

        Returns:
            The first fault of the run; None at all other steps.
        """
        numerics, module, ranks = self.numerics, loop.module, loop.run.ranks
        if numerics is None:
            return None
        left_out = overflowed or loop.is_gradient_scaled(optimizer)
        losses = [part.step_loss for part in self._parts if part.step_loss is not None and ranks.world == 1]
        gradients = [] if left_out else [p.grad for p in module.parameters() if p.grad is not None]
        numerics.recovered = finite(losses + gradients)
        if numerics.recovered or not bool(numerics.nonfinite_step.isnan()):
            return None
        moved = MOVED_BEFORE if again and not loop.repeats_forward else None

        def rank_fault() -> Fault:
            if moved is not None:
                return Fault(step, "unknown", reason=moved)
            try:
                with untouched(module):
                    return ranks.private(lambda: self._traced(step, module, loop.new_step(is_shared=False)))()
            except Exception as error:  # whatever the user's objects raise
                return Fault(step, "unknown", reason=f"its replay failed, {type(error).__name__}: {error}")

        faults = ranks.together(lambda: ranks.gather(rank_fault, "the fault"))
        located = [k for k, fault in enumerate(faults) if fault.where != "unknown"]
        if not located and left_out:  # the scaled loss has overflowed
            numerics.recovered = True
            return None
        first = located[0] if located else 0
        fault = replace(faults[first], rank=first) if ranks.world > 1 else faults[first]
        numerics.blame(fault)
        if ranks.rank == 0:
            self.monitor.errors.warn_once(f"step {step} is not finite: {fault}")
        return fault

    def _traced(self, step: int, module: nn.Module, pending: PendingStep) -> Fault:
        if pending.module_copy is None:
            raise pending.failure or AssertionError
        if not self._parts:
            return Fault(step, "unknown", reason="its batches were not seen")
        with restored(list(module.parameters())):  # a training_step may move them
            copy = pending.module_copy.reset()
            for part in self._parts:
                part.random_state.restore()
                batch = copied(part.batch)
                with muted():
                    fault = first_fault(partial(part.loss, copy, batch), copy, batch, step=step)
                if fault is not None:
                    return fault
        return Fault(
            step,
            "unknown",
            reason="in a replay of the step loss and gradient are finite: the gradient was changed after the backward "
            "pass, or the loss depends on something outside of batch and module",
        )


def first_fault_of(monitor: Monitor) -> Fault | None:
    """Return what made the first NaN or Inf of the run; None before it, and if `Numerics` is not measured."""
    return next((quantity.fault for quantity in monitor.quantities.all if isinstance(quantity, Numerics)), None)


def unrecovered_fault_of(monitor: Monitor) -> Fault | None:
    """Return the first fault of the run, unless loss and gradient have been finite again since."""
    recovered = any(isinstance(quantity, Numerics) and quantity.recovered for quantity in monitor.quantities.all)
    return None if recovered else first_fault_of(monitor)


def finite(tensors: list[Tensor]) -> bool:
    """Return whether all numbers are finite; reads from the device once, unless they are not or nearly overflow."""
    dense = [sparse_values(t) if t.layout is torch.sparse_coo else t for t in tensors if t.numel()]
    if not dense:
        return True
    norms = foreach_norm(dense)
    if len({norm.device for norm in norms}) > 1:
        norms = tuple(norm.cpu() for norm in norms)
    if bool(torch.stack(norms).sum().isfinite()):
        return True
    return all(bool(t.isfinite().all()) for t in dense)  # the norm itself may have overflowed
