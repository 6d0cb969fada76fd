"""The loss of a whole step, from Lightning's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class StepLoss:
    """Sums the losses of a step's micro-batches; under manual optimisation, those of all its backward passes.

    Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.left_out = False
        self._returned: Tensor | None = None
        self._differentiated: Tensor | None = None

    def saw(self, loss: Tensor) -> None:
        """A loss that is differentiated next."""
        loss = loss.detach()
        self._differentiated = loss if self._differentiated is None else self._differentiated + loss

    def returned(self, outputs: Any) -> None:
        """What ``training_step`` gave back for a micro-batch, its loss divided by their number already."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
            loss = loss if loss.ndim == 0 else loss.mean()  # a kernel less at every step
            self._returned = loss if self._returned is None else self._returned + loss

    @property
    def value(self) -> Tensor | None:
        """The loss of the step; None where nobody told it."""
        return self._returned if self._differentiated is None else self._differentiated
