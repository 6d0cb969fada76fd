"""The sharpest direction of a plain module's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.loss_hessian import loss_hessian
from lsp_callbacks.linalg import lanczos, norm, spectrum_bounds, unit

#: Probability, over the random part of the start, that an eigenvalue lies further above than the tolerance says.
FAILURE = 1e-3


def sharpness(
    module: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any],
    *,
    tol: float = 1e-3,
    steps: int = 200,
) -> Tensor:
    """Return ``lambda_max(d^2 L / d theta^2)``, the largest eigenvalue of the Hessian of a loss.

    ``L = loss_fn(module(inputs), targets)``, theta the parameters that require a gradient. Full-batch gradient descent
    at the rate lr is linearly stable while ``lr * sharpness < 2``; see `stability_constant` for momentum. It is the
    largest eigenvalue in the *algebraic* sense: where the loss curves downwards in all directions it is negative.

    The module is left as it is, see `loss_hessian`, which also says how dropout, BatchNorm and attention are taken.

    Args:
        module: with parameters in float32 or float64.
        loss_fn: from ``(outputs, targets)`` to a scalar.
        batch: ``(inputs, targets)``.
        tol: relative to the largest absolute eigenvalue: with probability 0.999 over a random start, the same at each
            call, no eigenvalue lies further above the value than this.
        steps: at most this many Hessian products; with one for each parameter the result is exact up to rounding.

    Returns:
        ``()``, float64, on the CPU, without a graph; in units of loss / parameter^2. It is a lower bound.

    Raises:
        ValueError: for an argument out of its range.
        Unmeasurable: see `loss_hessian`; where a product is not finite; and where ``steps`` do not reach ``tol``: the
            message has both bounds.

    Cost: two gradients a product, some 20 to 100 products, and the memory of as many vectors of all parameters.

    Source: Cohen et al. 2021; docs/theory.md, section Edges of stability.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import sharpness
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> round(float(sharpness(net, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))), 4)  # H = diag(1, 9)
        9.0
    """
    number("tol", tol, above=0, most=1), whole("steps", steps, 2)
    hessian, gradient = loss_hessian(module, loss_fn, batch)
    n = len(gradient)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=hessian.dtype).to(hessian.device)
    start = unit(noise)
    if bool(gradient.any()):  # it leans towards sharp directions
        start = start + unit(gradient)
    share = 1 / float(norm(start))  # of the noise
    ritz = lanczos(hessian, start, steps=steps, tol=tol if steps < n else 0.0, failure=FAILURE, share=min(share, 1.0))
    value, size = ritz.values[-1], ritz.values.abs().amax()
    upper = spectrum_bounds(ritz, failure=FAILURE, share=min(share, 1.0))[1]
    if not bool(size.isfinite()):
        raise Unmeasurable("a product with the Hessian is not finite: the loss overflows around these parameters")
    if not ritz.converged and not bool(upper - value <= tol * size):
        raise Unmeasurable(
            f"after steps={steps} the largest eigenvalue lies between {float(value):.6g} and {float(upper):.6g}, which "
            f"is wider than tol={tol}: give more steps, or a larger tol"
        )
    return value
