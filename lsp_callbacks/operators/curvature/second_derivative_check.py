"""Whether products with second derivatives agree with central differences of gradients, at one of some distances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import Comparison
from lsp_callbacks.linalg import norm, unit
from lsp_callbacks.operators.curvature.central_difference import central_difference
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.snapshot import Snapshot

Product = Callable[[Tensor], Tensor]


def hessian_agrees(product: Product, gradient: Tensor, snapshot: Snapshot) -> bool:
    """Return whether one exact Hessian product is that of a central difference.

    A difference may cross a kink, whose effect depends on the distance: nearer ones decide. Where rounding hides the
    difference, farther ones decide.

    Args:
        product: ``v -> H v``.
        gradient: of the step, flat.
        snapshot: the step.

    Cost: a product, and two to ten gradients.
    """
    noise = torch.randn(len(gradient), generator=snapshot.generator("custom"), dtype=gradient.dtype).to(gradient.device)
    # The gradient leans towards what is sharp; noise sees the rest, but for parameters that the step does not move.
    v = unit(unit(noise * _is_moved(snapshot).to(noise)) + unit(gradient))
    image = product(v)

    def compared(far: float) -> tuple[Tensor, Comparison]:
        central, distance = central_difference(snapshot, v, far)
        return central, Comparison.of(image, central, gradient, distance)

    earlier, first = compared(1.0)
    if first.agrees:
        return True
    before = first
    for far in (1 / 8, 1 / 64):
        central, now = compared(far)
        # The effect of a kink would be gone here, or eight times as large: a defect that stays is the product's.
        if not before.rounded and float(norm(central - earlier)) <= 0.5 * before.defect:
            return False
        if now.agrees:
            return True
        earlier, before = central, now
    if not first.rounded:
        return False
    if compared(8.0)[1].agrees:
        return True
    farthest = compared(64.0)[1]
    return farthest.agrees or farthest.lost


def _is_moved(snapshot: Snapshot) -> Tensor:
    """Return 1 for each parameter that the step gives a gradient, 0 for the others, flat: these stay where they are."""
    parameters, gradient = snapshot.parameters, snapshot.gradient or {}
    ones = [None if gradient.get(name, p) is None else torch.ones_like(p) for name, p in parameters.items()]
    return flatten(ones, list(parameters.values()))


def criterion_agrees(product: Product, criterion: Callable[[Tensor], Tensor], outputs: Tensor) -> bool:
    """Return whether a product with the criterion's Hessian is that of a central difference of its gradients.

    Outputs near 0, or far from their targets, say little about the right distance: the first is relative to their size.

    Args:
        product: ``v -> S v``, S the Hessian of N times the mean loss of N samples.
        criterion: from outputs to the mean loss.
        outputs: ``(N, ...)``.
    """
    v = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    precision = torch.finfo(outputs.dtype).eps
    size = float(norm(outputs.detach())) / outputs.numel() ** 0.5 or 1.0
    image = product(v)

    def gradient(moved: Tensor) -> Tensor:
        moved = moved.requires_grad_()
        with torch.enable_grad():
            return len(outputs) * torch.autograd.grad(criterion(moved), moved)[0]

    for far in (1.0, 8.0, 64.0, 512.0, 1 / 8):
        distance = far * 8.7 * precision**0.5 * size
        ahead, behind = (gradient(outputs.detach() + sign * distance * v) for sign in (1.0, -1.0))
        comparison = Comparison.of(image, (ahead - behind) / (2 * distance), ahead, distance)
        if comparison.agrees or (far > 100 and comparison.lost):
            return True
    return False
