"""A plain PyTorch loop, as a `StepObserver` sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.spread_tensors import has_shards
from lsp_callbacks.monitor.training_loop import TrainingLoop
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.pending_step import LossFn
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.shards import local_parameters, why_refused


class PlainLoop(TrainingLoop):
    """A loop that calls the optimizer itself.

    Args:
        module: whose parameters are trained.
        run: what all steps of the run share.
        loss_fn: ``(module, batch) -> loss``, before it is divided by ``accumulate`` and scaled.
        accumulate, clipping, scaler: see `Watch`.

    Raises:
        ValueError: for ``accumulate`` below 1.

    Attributes:
        probe_loss: the loss whose criterion tells outputs from targets.
    """

    def __init__(
        self,
        module: nn.Module,
        run: RunContext,
        loss_fn: LossFn,
        *,
        accumulate: int = 1,
        clipping: Clipping | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: give the number of batches in an update, 1 or more")
        super().__init__(module, run)
        self.loss_fn, self.accumulate, self.scaler, self._clipping = loss_fn, accumulate, scaler, clipping
        self.probe_loss: Callable[[nn.Module, Any], Any] = loss_fn

    @property
    def clipping(self) -> Clipping | None:
        """How the loop clips."""
        return self._clipping

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the loss of one batch as it is differentiated, before it is scaled."""
        return self.loss_fn(module, batch) / self.accumulate

    def evaluated(self) -> tuple[Callable[[nn.Module, Any], Any], Callable[[], contextlib.AbstractContextManager]]:
        return self.probe_loss, contextlib.nullcontext

    def loss_scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def scales(self, optimizer: torch.optim.Optimizer) -> tuple[float, Any]:
        return self.loss_scale(), getattr(optimizer, "grad_scale", None)


def why_unsupported(module: nn.Module) -> str | None:
    """Return why a loop is not supported that runs in several processes; None in one, and with shards (FSDP2)."""
    processes = Ranks.joined("cpu").world
    if processes == 1:
        return None
    if has_shards(module):
        return why_refused(module, processes)
    return (
        f"{processes} processes: a loop of one's own is measured in one, or with shards (fully_shard, "
        "parallelize_module); Lightning's Trainer with 'ddp' in several"
    )


def processes_of(module: nn.Module) -> Ranks:
    """Return the processes that train a module together: all of them where each holds a shard, otherwise this one."""
    if not has_shards(module):
        return Ranks()
    return Ranks.joined(next(iter(local_parameters(module).values()), torch.empty(0)).device)


def check_schedulers(schedulers: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, ...] | None:
    """Return one or several schedulers as a tuple; None where none are given, so that their form is not known.

    Raises:
        ValueError: if one of them does not set the rate of this optimizer.
    """
    several = tuple(schedulers) if isinstance(schedulers, list | tuple) else (schedulers,)
    for scheduler in several:
        if not is_scheduler_of(optimizer, scheduler):
            raise ValueError(
                f"schedulers={scheduler!r} does not set this optimizer's rate: give those that do, or none"
            )
    return several or None


def is_scheduler_of(optimizer: torch.optim.Optimizer, scheduler: Any) -> bool:
    """Return True if the scheduler sets the rate of this optimizer, which Fabric and accelerate wrap."""
    scheduled = getattr(scheduler, "optimizer", None)
    return getattr(scheduled, "optimizer", scheduled) is optimizer
