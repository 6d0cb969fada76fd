"""Losses at shifted parameters: points on a line, every bit back at the end, and how much of a loss is rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import foreach_copy
from lsp_callbacks.autograd.graph import read

#: Rounding of a mean over a batch, in units of its number type: measured against float64.
ROUNDING = 4.0


@contextlib.contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Put every bit of the parameters back at the end, whatever moves them inside; yields the copy that is put back.

    Subtracting what was added would not: sums are rounded.
    """
    saved = [p.detach().clone() for p in parameters]
    try:
        yield saved
    finally:
        if saved:
            foreach_copy([p.data for p in parameters], saved)


@contextlib.contextmanager
def put_back(parameters: Sequence[nn.Parameter], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Give the parameters earlier values for a while, and every bit back at the end; None leaves them as they are."""
    if values is None:
        yield
        return
    with restored(parameters):
        shift(parameters, values, values, 0.0)
        yield


def shift(
    parameters: Iterable[nn.Parameter], start: Iterable[Tensor], along: Iterable[Tensor], multiple: float
) -> None:
    """Set the parameters to ``start + multiple * along``, tensor by tensor: no flat vector is made."""
    with torch.no_grad():
        for p, x, direction in zip(parameters, start, along, strict=True):
            p.data.copy_(torch.add(x, direction.to(x.dtype), alpha=multiple) if multiple else x)


def loss_rounding(loss: Tensor) -> float:
    """Return the size of a loss's error by rounding, relative to it.

    It is taken as that of the least precise number type between the loss and the parameters.
    """
    return ROUNDING * torch.finfo(loss.dtype if loss.grad_fn is None else read(loss).dtype).eps
