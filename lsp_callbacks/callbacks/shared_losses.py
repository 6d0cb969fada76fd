"""The losses of several processes, exchanged every few steps so that all of them take the same decision."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lsp_callbacks.monitor.losses import ArrivedLoss
from lsp_callbacks.step.ranks import Ranks

#: Steps in an exchange. On a GPU its numbers are read at the next one, so a loss is known after nine steps at most.
EVERY = 5


class SharedLosses:
    """Collects the mean loss of all processes without waiting for it at every step.

    Every fifth step one all-gather of a few numbers is queued behind the work of the step. On the CPU they are there at
    once; from a GPU they are copied to pinned memory and read at the next exchange, when they have long arrived. Every
    process reads the same bits at the same step: whoever decides by them alone decides as the others do. A measured
    step, in which the processes have waited for each other anyway, exchanges and reads them at once.

    Args:
        ranks: the processes, all of which call `take` at the same steps.

    Attributes:
        same_rates: whether the learning rates of all processes were equal in all that was read so far; if not, they
            are nothing to decide by.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self.same_rates = True
        self._steps: list[tuple[int, bool]] = []
        self._rows: list[Tensor] = []
        self._sent: tuple[list[tuple[int, bool]], Tensor, Any] | None = None

    def take(
        self, step: int, loss: Tensor | None, *, lr: float, left_out: bool = False, wait: bool = False
    ) -> list[ArrivedLoss]:
        """Add the loss of a step, and return the mean losses that are known since the last call, oldest first.

        Args:
            step: number of the optimizer step.
            loss: of this process, None where it has none; the mean is that of the processes that have one.
            lr: learning rate of this process.
            left_out: whether a gradient scaler left the update out.
            wait: for all that is not known yet; the same on all processes.
        """
        has_loss = isinstance(loss, Tensor)
        mean = loss.detach().double().mean() if isinstance(loss, Tensor) else torch.zeros((), dtype=torch.float64)
        mean = mean.to(self._ranks.device, non_blocking=True)
        self._rows.append(torch.stack([mean, torch.full_like(mean, has_loss), torch.full_like(mean, lr)]))
        self._steps.append((step, left_out))
        if wait:
            return self.rest()
        return self._exchange() if len(self._steps) == EVERY else []

    def rest(self) -> list[ArrivedLoss]:
        """Return what is not known yet; called by all processes, as when training ends, it waits for the device."""
        return (self._exchange() if self._steps else []) + self._read()

    def _exchange(self) -> list[ArrivedLoss]:
        earlier = self._read()
        rows = torch.stack(self._rows)
        by_rank = [torch.empty_like(rows) for _ in range(self._ranks.world)]
        dist.all_gather(by_rank, rows)
        numbers, arrived = torch.stack(by_rank), None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(numbers.device))
            numbers = pinned
        self._sent = (self._steps, numbers, arrived)
        self._steps, self._rows = [], []
        return earlier if arrived is not None else earlier + self._read()

    def _read(self) -> list[ArrivedLoss]:
        """Return the mean losses of the last exchange."""
        if self._sent is None:
            return []
        (steps, numbers, arrived), self._sent = self._sent, None
        if arrived is not None:
            arrived.synchronize()
        losses, shares, rates = numbers.unbind(-1)
        self.same_rates &= bool((rates == rates[:1]).all())
        means = (losses.sum(0) / shares.sum(0)).tolist()
        return [
            ArrivedLoss(step, mean, left_out)
            for (step, left_out), mean, share in zip(steps, means, shares.sum(0).tolist())
            if share
        ]
