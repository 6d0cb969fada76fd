"""What is kept from a step until its update was made, to see what the update did to the loss of its own batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsp_callbacks.autograd.graph import read
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.flat import restored, split
from lsp_callbacks.step.replay_checks import replayed_gradient, verify_gradient
from lsp_callbacks.step.snapshot import Snapshot

#: Rounding of a mean over a batch, in units of its number type: measured against float64.
ROUNDING = 4.0
#: Numbers of float32 in an inner product whose rounding is nothing beside that of the losses.
PIECE = 65536


class LossChange(NamedTuple):
    """What an update did to the loss of its own batch; float64, means over the ranks.

    Attributes:
        slope: ``g . u``, the change to first order.
        change: ``L(theta + u) - L(theta)``.
        rounding: size of the error of ``change`` by rounding.
    """

    slope: Tensor
    change: Tensor
    rounding: Tensor


class TakenStep:
    """A step whose update comes next: its loss, gradient, parameters and replay.

    The `Snapshot` itself is not kept, as it may hold autograd graphs.

    Args:
        snapshot: the step, before its update.
        check: whether the step's gradient is compared with that of its loss, and, after the update, a replay at the
            parameters before it with the step's loss.

    Raises:
        Unmeasurable: if the gradient is another one.

    Cost: none; a gradient and a forward pass with ``check``.
    """

    def __init__(self, snapshot: Snapshot, *, check: bool = False):
        if check:
            verify_gradient(snapshot)
        self._check = check
        self.step, self.run = snapshot.step, snapshot.run
        self._replay, self._tolerance = snapshot.replay, snapshot.tolerance
        self._parameters = list(snapshot.parameters.values())
        loss, gradient = snapshot.loss, snapshot.flat_gradient
        if loss is None or gradient is None:
            replayed = replayed_gradient(snapshot)
            loss, gradient = replayed[0] if loss is None else loss, replayed[1] if gradient is None else gradient
        self._loss, self._gradient = loss, split(gradient, self._parameters)
        self._before = [p.detach().clone() for p in self._parameters]

    def loss_change(self) -> LossChange | None:
        """Return what the update did, once it was made; None where nothing has moved.

        The rounding of a loss is taken as that of the least precise number type between it and the parameters.

        Raises:
            Unmeasurable: if the loss at the parameters before the update is not that of the step any more.

        Cost: one forward pass, with its graph, so that it takes the same path as in training; two with a check.
        """
        ranks, pairs = self.run.ranks, list(zip(self._parameters, self._before))
        if not ranks.any(lambda: any(not torch.equal(p.detach(), before) for p, before in pairs), "the update"):
            return None
        # Tensor by tensor: a flat update would be as large as the weights, and there may be little room.
        slope = sum(_dot(g, p.detach() - before) for g, (p, before) in zip(self._gradient, pairs))
        self._gradient = []

        def rank_change() -> tuple[Tensor, Tensor]:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                after = self._replay()
                eps = torch.finfo(read(after).dtype).eps
            before, after = self._loss.double(), after.detach().double()
            rounding = ROUNDING * eps * before.abs() + self._tolerance * before.abs()
            if self._check and not bool((self._replay_before().double() - before).abs() <= rounding):
                raise Unmeasurable(
                    f"the loss of step {self.step} is another one after its update, at the same parameters: something "
                    "outside the batch, the module and the random state changes it from step to step (a counter, a "
                    "global variable): keep it in the module"
                )
            return after - before, rounding + ROUNDING * eps * after.abs()

        change, rounding = ranks.mean(rank_change, "the loss after the update")
        return LossChange(torch.as_tensor(slope), change, rounding)

    def _replay_before(self) -> Tensor:
        with torch.no_grad(), restored(self._parameters):
            for p, before in zip(self._parameters, self._before):
                p.copy_(before)
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                return self._replay().detach()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return an inner product in float64: of long float32 vectors the sum of those of pieces, without longer copies."""
    if a.dtype is not torch.float32 or b.dtype is not torch.float32:
        return (a.double() * b.double()).sum()
    pieces = zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE))
    return torch.stack([torch.dot(*pair) for pair in pieces]).sum(dtype=torch.float64)
