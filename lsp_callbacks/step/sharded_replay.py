"""Replays of a step whose parameters lie in shards on the processes: collectives that all enter, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.spread_tensors import local_gradients
from lsp_callbacks.step.batch import MicroBatch, batch_size
from lsp_callbacks.step.module_in_place import ModuleInPlace
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.replay import replayer

T = TypeVar("T")


class ShardedReplay:
    """Computes the loss of a step again with the shards as they are, and on request its gradient.

    Every process has to call it, as the module gathers its weights from all. If the forward or the backward pass fails
    on one of them, all raise: before each collective of the module they agree that none has failed, see
    `Ranks.checked`.

    The shards do not appear in the module's own autograd graph, which holds the weights that were gathered. So the
    loss has a graph of one node, from the shards of this process; its backward pass is that of the module, whose
    gradients are the means over the processes.

    Args:
        place: the module, as it was before the step.
        parts: the micro-batches of the step.
        ranks: all processes.
        parameters: the shards of this process; plain tensors in the same memory, see `local_parameters`.

    Cost: as the step's own passes, and an all-reduce of three numbers before each of their collectives.
    """

    def __init__(
        self, place: ModuleInPlace, parts: Sequence[MicroBatch], ranks: Ranks, parameters: Sequence[nn.Parameter]
    ):
        self.place, self.ranks, self.parameters = place, ranks, parameters
        self._trained = [p for p in place.module.parameters() if p.requires_grad]
        self._replay = replayer(place, parts)
        #: In its only micro-batch; None where that is not known, or there are several.
        self.samples = batch_size(parts[0].batch) if len(parts) == 1 else None

    def __call__(self) -> Tensor:
        """Return the loss of this process."""

        def forward() -> Tensor:
            with self.place.running(), self.ranks.checked():
                return self._replay()

        loss = self.ranks.apart(forward)
        return Replayed.apply(self, Held(loss), *self.parameters) if loss.requires_grad else loss

    def look(self, function: Callable[[Tensor], T]) -> T:
        """Return what a function makes of the loss with the module's own graph; while it runs it may communicate."""

        def looked() -> T:
            with self.place.running(), self.ranks.checked():
                return function(self._replay())

        return self.ranks.apart(looked)

    def before_step(self, function: Callable[[], T]) -> T:
        """Return what a function makes of the module as it was before the step."""
        with self.place.running():
            return function()

    def gradients(self, loss: Tensor, weight: Tensor) -> list[Tensor | None]:
        """Return the gradients of a loss at the shards of this process, the means over the processes."""

        def backward() -> list[Tensor | None]:
            with self.place.running(), self.ranks.checked():
                return self.pulled(loss, weight)

        return self.ranks.apart(backward)

    def pulled(self, outputs: Tensor, cotangent: Tensor) -> list[Tensor | None]:
        """Return the gradients of ``<cotangent, outputs>`` likewise, while the module runs, see `look`."""
        with self.place.gradients_aside():
            outputs.backward(cotangent)
            return local_gradients(self._trained)


class Held:
    """A loss with its graph, as an object that autograd does not look into."""

    def __init__(self, loss: Tensor):
        self.loss = loss


class Replayed(torch.autograd.Function):
    """The loss of a replay as a function of the shards."""

    @staticmethod
    def forward(ctx: Any, replay: ShardedReplay, held: Held, *parameters: Tensor) -> Tensor:
        ctx.replay, ctx.replayed = replay, held.loss
        return held.loss.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> Any:
        return None, None, *ctx.replay.gradients(ctx.replayed, weight)


def raising(ranks: Ranks, error: Exception) -> Callable[[], Tensor]:
    """Return a replay that raises, together with the replays of the other processes."""

    def fail() -> Tensor:
        raise error

    return lambda: ranks.apart(fail)
