"""Critical sharpness: 2 over the learning rate at which a loss goes up along an update, by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import number
from lsp_callbacks.autograd.shifted_parameters import loss_rounding, restored, shift
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.critical_step import critical_step


class CriticalSharpness(NamedTuple):
    """Critical sharpness along an update.

    Attributes:
        value: ``2 / (lr multiple)``, float64.
        error: how far the true value can be from it, relative to it.
        multiple: the least multiple of the update at which the loss goes up.
        passes: forward passes.
    """

    value: Tensor
    error: float
    multiple: float
    passes: int


def critical_sharpness(
    module: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    direction: Tensor,
    *,
    lr: float = 1.0,
    slope: float | None = None,
    start: float = 1.0,
    tolerance: float = 0.01,
) -> CriticalSharpness:
    """Return ``2 / eta_c``, eta_c the least learning rate at which an update u raises a loss.

    With u the update at the rate lr, ``eta_c = lr min {s > 0 : L(theta + s u) > L(theta)}``. On a quadratic::

        2 / eta_c = u^T H u / (-g^T u) / lr

    so that for gradient descent, u = -lr g, it is the directional sharpness ``g^T H g / ||g||^2``, which is at most the
    sharpness. For an optimizer whose update is ``-lr P^{-1} g`` it is a Rayleigh quotient of the preconditioned
    Hessian, at most its largest eigenvalue. With the update of one loss and another ``loss`` it is the *relative*
    critical sharpness of that one: how fast it would go up while the first is trained.

    Parameters, buffers, modes and the global random states are afterwards what they were, to the last bit, and all
    passes see the same random masks and the same buffers. The module runs in the mode that it is in. What its
    ``forward`` does to other Python objects is not undone.

    Args:
        module: with the parameters theta; those that require a gradient count.
        loss: ``(module) -> scalar``.
        direction: the whole update u, flat, in the order of ``module.named_parameters()``.
        lr: the rate at which the update was made.
        slope, start, tolerance: see `critical_step`.

    Raises:
        ValueError: for a direction of another length, or a rate that is not positive.
        Unmeasurable: where the loss is not finite, and see `critical_step`.

    Cost: a forward pass, and 2 to 6 more. Memory: a copy of the parameters.

    Source: Kalra et al. 2026.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import critical_sharpness
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> loss = lambda net: net(x).square().sum() / 2  # its Hessian is diag(1, 9)
        >>> (g,) = torch.autograd.grad(loss(net), list(net.parameters()))
        >>> value = critical_sharpness(net, loss, -g.flatten()).value
        >>> bool((value - (g[0, 0] ** 2 + 9 * g[0, 1] ** 2) / g.square().sum()).abs() < 1e-3)
        True
    """
    number("lr", lr, above=0)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if direction.numel() != sum(p.numel() for p in parameters):
        raise ValueError(
            f"direction has {direction.numel()} numbers: give one for each of the {sum(p.numel() for p in parameters)} "
            "parameters that require a gradient"
        )
    along = [part.view_as(p) for part, p in zip(direction.split([p.numel() for p in parameters]), parameters)]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    random_state = RandomState()

    def evaluated() -> tuple[float, float]:
        try:
            random_state.restore()
            value = loss(module)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        number = float(value.detach().double())
        return number, loss_rounding(value) * abs(number)

    try:
        with restored(parameters) as theta:
            before, rounding = evaluated()
            if not abs(before) < float("inf"):
                raise Unmeasurable(f"the loss is {before}: it goes up from a finite one only")

            def change(multiple: float) -> tuple[float, float]:
                shift(parameters, theta, along, multiple)
                after, error = evaluated()
                return after - before, rounding + error

            multiple, error, passes = critical_step(change, slope=slope, start=start, tolerance=tolerance)
    finally:
        random_state.restore()
    return CriticalSharpness(torch.tensor(2 / (lr * multiple), dtype=torch.float64), error, multiple, passes + 1)
