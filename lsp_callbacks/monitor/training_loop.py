"""What an observer asks the loop that trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.monitor.update_check import ELSEWHERE
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.run_context import RunContext

#: The loss of one micro-batch as it is differentiated, from the module and the batch.
MicroBatchLoss = Callable[[nn.Module, Any], Tensor | None]


class TrainingLoop:
    """Facts about one run of a training loop; a loop that differs from the plain one overrides the answers.

    Args:
        module: whose parameters are trained.
        run: what all steps of the run share.

    Attributes:
        shows_losses: whether each loss is shown to the last bit before its backward pass; otherwise a replay of the
            step is compared with the step's gradient.
        accumulate: micro-batches in a step.
        repeats_forward: whether each update of a batch has a forward pass of its own, as with LBFGS.
        shared: objects that a module holds and its copy shares, as the optimizers that a library puts there.
        moves_parameters: whether code of the user's may move the parameters together with the optimizer, so that each
            measured update is compared with the optimizer's.
        wrong_update: what is said where an update was found to be another one.
    """

    shows_losses = False
    repeats_forward = False
    accumulate: int = 1
    wrong_update = ELSEWHERE

    def __init__(self, module: nn.Module, run: RunContext):
        self.module, self.run = module, run
        self.shared: tuple[Any, ...] = ()
        self.moves_parameters = run.prox is not None

    @property
    def clipping(self) -> Clipping | None:
        """How each gradient is clipped after it was measured, as far as that is known before the step."""
        return None

    def has_backward(self) -> bool:
        """Return whether a backward pass follows the forward pass that comes next."""
        return True

    #: Whether a step may be measured without a copy of the module, where no quantity needs a replay.
    can_do_without_replay = True

    def new_step(
        self, *, is_shared: bool = True, readers: Mapping[str, GraphReader] | None = None, can_replay: bool = True
    ) -> PendingStep:
        """Return a copy of the module from which the coming step can be replayed.

        Args:
            is_shared: whether the ranks replay the step together; otherwise each does so by itself.
            readers, can_replay: see `PendingStep`.
        """
        return PendingStep(
            self.module,
            run=self.run if is_shared else None,
            shared=self.shared,
            readers=readers,
            can_replay=can_replay,
            micro_batches=self.accumulate,
        )

    def on_device(self, batch: Any) -> Any:
        """Return a batch as it comes from a loader in the form in which the step receives it."""
        return batch

    def clipping_of(self, pending: PendingStep, optimizer: torch.optim.Optimizer) -> Clipping | None:
        """Return how the gradient of this step will be clipped.

        Raises:
            Unmeasurable: if what the user's code does to the gradient is no clipping.
        """
        return self.clipping

    def evaluated(self) -> tuple[Callable[[nn.Module, Any], Any], Callable[[], contextlib.AbstractContextManager]]:
        """Return the loss whose criterion separates outputs from targets, and the context in which it is called."""
        raise NotImplementedError

    def loss_scale(self) -> float:
        """Return the factor of a gradient scaler on the loss of each backward pass; 1 without one."""
        return 1.0

    def is_gradient_scaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if the gradients still hold that factor: fused optimizers divide it out by themselves."""
        return self.scales(optimizer)[1] is not None

    def scales(self, optimizer: torch.optim.Optimizer) -> tuple[float, Any]:
        """Return `loss_scale`, and by what the gradients have to be divided before they are measured, or None."""
        return self.loss_scale(), None
