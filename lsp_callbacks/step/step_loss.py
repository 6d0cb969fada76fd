"""The loss of a whole step, from the losses of its micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def loss_of(outputs: Any) -> Any:
    """Return the loss in what ``training_step`` or a model returned: the value itself, or that under ``"loss"``."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs


def summed(losses: Iterable[Tensor | None]) -> Tensor | None:
    """Return the sum of the losses that are not None, in their order; None if there is none."""
    present = [loss for loss in losses if loss is not None]
    return functools.reduce(torch.add, present) if present else None


class StepLoss:
    """The losses of one step's micro-batches, each divided by their number already.

    A loop may show a loss in two places: before its backward pass (`add`), and as what the micro-batch returned at its
    end (`add_returned`). The first is there before the update, and counts every backward pass; the second costs nothing
    where the first would have to be unscaled. Nothing here waits for the device.

    Attributes:
        differentiated: the sum of the losses before their backward passes; None where none was seen.
        returned: the sum of the losses that the micro-batches returned; None where none was seen.
        is_ambiguous: whether one of the micro-batches had several backward passes: which of their losses count is not
            known.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self.differentiated: Tensor | None = None
        self.returned: Tensor | None = None
        self._losses: list[Tensor] = []  # that were differentiated
        self._passes, self.is_ambiguous = 0, False

    def begin_batch(self) -> None:
        """Count the backward passes of the micro-batch that comes next."""
        self._passes = 0

    def add(self, loss: Tensor) -> None:
        """Take in a loss that is differentiated next."""
        self._passes += 1
        self.is_ambiguous |= self._passes > 1
        # A copy, as what follows may change it in place.
        copied = loss.detach().clone().reshape(() if loss.numel() == 1 else loss.shape)
        self._losses.append(copied)
        self.differentiated = copied if self.differentiated is None else self.differentiated + copied

    def add_returned(self, outputs: Any) -> None:
        """Take in what a micro-batch returned, in single precision at least; anything without a loss is passed over."""
        loss = outputs["loss"] if type(outputs) is dict and "loss" in outputs else loss_of(outputs)
        if isinstance(loss, Tensor):
            if loss.requires_grad:
                loss = loss.detach()
            if loss.dtype is not torch.float32:
                loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
            loss = loss if loss.ndim == 0 else loss.mean()
            self.returned = loss if self.returned is None else self.returned + loss

    def average(self) -> None:
        """Take the mean of the differentiated losses in place of their sum: the loop divides by their number."""
        if self._losses:
            self.differentiated = torch.stack(self._losses).sum() / len(self._losses)
            self._losses = [self.differentiated]
