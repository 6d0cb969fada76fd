"""A look at every step, before its update; knows of no training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import foreach_norm, sparse_values
from lsp_callbacks.autograd.random_state import TorchRandomState
from lsp_callbacks.functional.numerics.first_fault import Fault, first_fault
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.quantities.numerics.numerics import Numerics
from lsp_callbacks.step.batch import MicroBatch, copied
from lsp_callbacks.step.flat import restored
from lsp_callbacks.step.muted import muted
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.replay import untouched


class Guard:
    """Finds out what made the first NaN or Inf of a run, if `Numerics` is among what is measured.

    At each step one norm over loss and gradient is read, the only wait for the device. The first time that it is not
    finite, the step is replayed once, at the parameters that it had (the update has not come yet), under
    `lsp_callbacks.functional.numerics.first_fault`; afterwards nothing is replayed any more. Until then the step's
    batches are kept by reference, with torch's random state. The copy of the module is made at the fault only: so its
    buffers and attributes are as the step left them, a batch that the step changed in place is as it left it, and
    numbers drawn from numpy or Python are others. Where the replay is finite, or fails, the `Fault` says so.

    Of several ranks all look at the gradient, which is the same on each, and the first that finds a fault tells it; a
    loss that is not finite, with a gradient that is, is looked at with one rank only.

    Args:
        monitor: that measures `Numerics`; if it does not, nothing is done.

    Cost: one reduction over the gradient a step.
    """

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self._parts: list[MicroBatch] = []

    @property
    def numerics(self) -> Numerics | None:
        """The quantity; None where it is not measured."""
        found = self.monitor.quantities.get(Numerics.name)
        return found if isinstance(found, Numerics) else None

    def begin(self) -> None:
        """The last step is over: its batches are let go."""
        self._parts = []

    def add(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor | None]) -> None:
        """A micro-batch whose forward pass comes next, and its loss as the step will differentiate it."""
        if self.numerics is not None:
            self._parts.append(MicroBatch(batch, loss, TorchRandomState()))

    def saw_loss(self, loss: Tensor) -> None:
        """The loss of the last micro-batch; a factor on it does no harm."""
        if self._parts:
            self._parts[-1].step_loss = loss.detach()

    def look(
        self,
        step: int,
        module: nn.Module,
        pending: Callable[[], PendingStep],
        *,
        ranks: Ranks,
        left_out: bool = False,
        moved: str | None = None,
    ) -> Fault | None:
        """Called when the gradient is complete, before the update.

        Args:
            step: number of the update.
            module: whose parameters and gradients these are.
            pending: makes the copy of the module for a replay.
            ranks: that take the step together.
            left_out: whether a gradient scaler will leave the update out, as scaled gradients have overflowed: that is
                no fault, unless the loss itself is not finite.
            moved: why the parameters are not those of the step any more, if they are not.

        Returns:
            The first fault of the run; None at all other steps.
        """
        numerics = self.numerics
        if numerics is None:
            return None
        losses = [part.step_loss for part in self._parts if part.step_loss is not None and ranks.world == 1]
        gradients = [] if left_out else [p.grad for p in module.parameters() if p.grad is not None]
        numerics.recovered = finite(losses + gradients)
        if numerics.recovered or not bool(numerics.nonfinite_step.isnan()):
            return None

        def own() -> Fault:
            if moved is not None:
                return Fault(step, "unknown", reason=moved)
            try:
                with untouched(module):
                    return ranks.private(lambda: self._traced(step, module, pending()))()
            except Exception as error:  # whatever the user's objects raise
                return Fault(step, "unknown", reason=f"its replay failed, {type(error).__name__}: {error}")

        found = ranks.together(lambda: ranks.gather(own, "the fault"))
        known = [k for k, fault in enumerate(found) if fault.where != "unknown"]
        if not known and left_out:  # the scaled loss has overflowed
            numerics.recovered = True
            return None
        first = known[0] if known else 0
        fault = replace(found[first], rank=first) if ranks.world > 1 else found[first]
        numerics.blame(fault)
        if ranks.rank == 0:
            self.monitor.warn_once(f"step {step} is not finite: {fault}")
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
            "pass, or something outside of batch and module has a say in the loss",
        )


def finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite; reads from the device once, unless they are not or nearly overflow."""
    dense = [sparse_values(t) if t.layout is torch.sparse_coo else t for t in tensors if t.numel()]
    if not dense:
        return True
    norms = foreach_norm(dense)
    if len({norm.device for norm in norms}) > 1:
        norms = tuple(norm.cpu() for norm in norms)
    if bool(torch.stack(norms).sum().isfinite()):
        return True
    return all(bool(t.isfinite().all()) for t in dense)  # the norm itself may have overflowed
