"""Whether the Hessian says what the gradient does along a real step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, norm


@dataclass(frozen=True)
class Secant:
    """Curvature along one step of the parameters.

    Attributes:
        secant: ``||g(theta + d) - g(theta)|| / ||d||``, in units of loss / parameter^2.
        curvature: ``||H d|| / ||d||``, H at theta.
        ratio: secant / curvature; None where the curvature is 0.
        unexplained: ``||g(theta + d) - g(theta) - H d|| / ||g(theta + d) - g(theta)||``: 0 on a quadratic; 0 where the
            gradient does not change at all.
        error: what the gradients' rounding does to the secant.
    """

    secant: Tensor
    curvature: Tensor
    ratio: Tensor | None
    unexplained: Tensor
    error: Tensor


def secant(
    before: Tensor, after: Tensor, step: Tensor, hessian: LinearOperator, *, theta: Tensor | None = None
) -> Secant:
    """Return the curvature that the gradient shows along a step, beside that of the Hessian, for the same batch.

    Where the loss is smooth and the step short the two agree. Across the kink of a ReLU the gradient jumps, while the
    Hessian, which exists almost everywhere, does not show it: then a sharpness, and every learning rate derived from
    it, misleads. ``lr * secant`` above 2 says that along its own direction the step overshoots.

    Args:
        before: the batch's gradient at theta, flat.
        after: its gradient at ``theta + step``.
        step: the displacement as it was, rounding included; not 0.
        hessian: at theta.
        theta: the parameters, for ``error``: see `gradient_rounding`.

    Cost: one Hessian product, two with ``theta``.

    Source: Katende 2025b (the counterexample); docs/theory.md, section The law of SGD, energies, kinks.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> one = lambda *v: torch.tensor(v, dtype=torch.float64)
        >>> result = secant(one(-1.0), one(1.0), one(0.1), from_matrix(one(0.0)[None]))  # |theta| across 0
        >>> float(result.secant), float(result.curvature), result.ratio, float(result.unexplained)
        (20.0, 0.0, None, 1.0)
    """
    length = norm(step)
    change = (after.double() - before.double()) / length
    along = (hessian @ (step / length.to(step)).to(hessian.dtype)).double()
    size, curvature, rest = (norm(v) for v in (change, along, change - along))
    return Secant(
        secant=size,
        curvature=curvature,
        ratio=size / curvature if bool(curvature > 0) else None,
        unexplained=rest / size if bool(size > 0) else torch.zeros_like(size),
        error=2 * gradient_rounding(before, hessian, theta) / length,
    )


def gradient_rounding(gradient: Tensor, hessian: LinearOperator, theta: Tensor | None = None) -> Tensor:
    """Return ``eps (||g|| + ||H (+-theta)||)``, about the norm of the rounding error of a gradient.

    The second term is what parameters that are rounded once, each up or down by chance, do to it: a gradient that is
    small because its parts cancel, as near a minimum, has their rounding.

    Args:
        gradient: in the type in which it was computed.
        hessian: at theta.
        theta: flat; None leaves the second term out.

    Cost: a Hessian product with theta.
    """
    noise = norm(gradient)
    if theta is not None:
        signs = torch.randint(0, 2, theta.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(theta)
        noise = noise + norm(hessian @ (signs * theta).to(hessian.dtype))
    return torch.finfo(gradient.dtype).eps * noise
