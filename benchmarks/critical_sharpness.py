"""Critical sharpness: the inverse of how far one can go along the update before the loss of the batch rises again."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

#: Doublings and bisections of the search.
REACH, BISECTIONS = 14, 3


class CriticalSharpness(pl.Callback):
    """Measures the rate over the critical one along the update, every so many steps (arXiv 2601.16979).

    With u the step's update, the critical rate is the step's own times the least s for which ``L(theta + s u)`` is
    above ``L(theta)`` on the step's batch; s is found by doubling or halving, and three bisections.

    Attributes:
        steps, values: ``1 / s`` of each reading.
        passes: forward passes so far.
    """

    def __init__(self, every: int = 25):
        self.every, self.steps, self.values, self.passes = every, [], [], 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._before = None
        if trainer.global_step % self.every == 0:
            self._before = [p.detach().clone() for p in pl_module.parameters()]
            self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(outputs["loss"])
        if self._before is None or not math.isfinite(loss):
            return
        after = [p.detach().clone() for p in pl_module.parameters()]
        buffers, random = copy.deepcopy(list(pl_module.buffers())), torch.get_rng_state()
        with torch.no_grad():
            self.steps.append(self._step)
            self.values.append(1 / self._search(pl_module, batch, loss, self._before, after))
            for p, value in zip(pl_module.parameters(), after):
                p.copy_(value)
            for buffer, value in zip(pl_module.buffers(), buffers):
                buffer.copy_(value)
        torch.set_rng_state(random)

    def _search(self, module: Any, batch: Any, loss: float, before: list[Tensor], after: list[Tensor]) -> float:
        def rises(s: float) -> bool:
            self.passes += 1
            for p, old, new in zip(module.parameters(), before, after):
                p.copy_(old + s * (new - old))
            return not float(module.training_step(batch, 0)) <= loss

        low = high = 1.0
        if rises(1.0):
            for _ in range(REACH):
                low = high / 2
                if not rises(low):
                    break
                high = low
        else:
            for _ in range(REACH):
                high = 2 * low
                if rises(high):
                    break
                low = high
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if rises(middle) else (middle, high)
        return math.sqrt(low * high)
