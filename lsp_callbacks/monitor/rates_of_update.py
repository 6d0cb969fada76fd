"""Learning rates that hold for one update alone: no scheduler ever sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group: in place, where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class RatesOfUpdate:
    """Sets the rates of parameter groups before the optimizer's step, and puts them back as soon as it is over.

    Right after the step, so before any scheduler: those that can be chained compute the next rate from the group's. A
    rate that is a tensor keeps its identity, as graphs that were captured refer to it, and is written in place.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[dict[str, Any], Any, Any]] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._handle: RemovableHandle | None = None

    def multiply(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        """Multiply all rates of the coming step by a factor."""
        if optimizer is not self._optimizer:
            self.close()
            self._optimizer, self._handle = optimizer, optimizer.register_step_post_hook(self._after_step)
        self.put_back()
        # All first: parameter groups may share one tensor.
        rates = [float(group["lr"]) * factor for group in optimizer.param_groups]
        self._replaced = [
            (group, group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"], rate)
            for group, rate in zip(optimizer.param_groups, rates)
        ]
        for group, _, rate in self._replaced:
            set_rate(group, rate)

    def put_back(self) -> None:
        """Give the groups their own rates again, if they have others; what somebody else has set since stays."""
        replaced, self._replaced = self._replaced, []
        for group, rate_before, rate in replaced:
            if isinstance(group["lr"], Tensor) and isinstance(rate_before, Tensor):
                group["lr"].copy_(rate_before)
            elif group["lr"] == rate:
                group["lr"] = rate_before

    def close(self) -> None:
        """Put the rates back, and leave the optimizer."""
        self.put_back()
        if self._handle is not None:
            self._handle.remove()
        self._optimizer = self._handle = None

    def _after_step(self, *args: Any) -> None:
        self.put_back()
