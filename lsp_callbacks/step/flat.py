"""Parameters, gradients and directions as one flat vector."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import foreach_add_, foreach_copy
from lsp_callbacks.autograd.shifted_parameters import restored


def flatten(tensors: Iterable[Tensor | None], like: list[nn.Parameter]) -> Tensor:
    """Return one flat vector; None stands for zeros, and the gradient of a sparse embedding becomes dense."""
    dense = (torch.zeros_like(p) if t is None else t.to_dense() for t, p in zip(tensors, like))
    return torch.cat([t.reshape(-1) for t in dense])


def split(vector: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    """Return views of a flat vector in the shapes of the parameters; the inverse of `flatten`."""
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in like]), like)]


@contextlib.contextmanager
def displaced(parameters: list[nn.Parameter], direction: Tensor, distance: float) -> Iterator[None]:
    """Move the parameters by ``distance * direction`` (flat), and put every bit back at the end."""
    moves = [d.to(p) for d, p in zip(split(direction, parameters), parameters)] if parameters else []
    with restored(parameters):
        if parameters:
            foreach_add_([p.data for p in parameters], moves, alpha=distance)
        yield


def loss_and_gradient(replay: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Return a loss and its flat gradient, computed on the path that training took, uncompiled."""
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        loss = replay()
        return loss, flatten(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)


def displaced_gradient(
    replay: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    start: list[Tensor],
    direction: Tensor,
    distance: float,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rise of a loss at displaced parameters, its size before, and the flat gradient there.

    Args:
        replay: computes the loss.
        parameters: that are displaced, and put back.
        start: copies of them, from which every bit is put back.
        direction: flat.
        distance: multiple of the direction.
        reference: the loss before; None takes that at the displaced parameters.
    """
    data = [p.data for p in parameters]
    try:
        foreach_add_(data, [d.to(x) for d, x in zip(split(direction, parameters), start)], alpha=distance)
        loss, gradient = loss_and_gradient(replay, parameters)
    finally:
        foreach_copy(data, start)
    before = loss.detach() if reference is None else reference
    return loss.detach() - before, before.abs(), gradient


def largest_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the largest learning rate of the parameter groups; NaN where the optimizer has none."""
    largest = math.nan
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if lr is not None and not float(lr) <= largest:
            largest = float(lr)
    return largest
