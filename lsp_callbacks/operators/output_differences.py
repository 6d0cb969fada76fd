"""Differences of outputs, and of the criterion's gradient with respect to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lsp_callbacks.operators.curvature import double_backward
from lsp_callbacks.operators.differences import lengths, norm, relative_move
from lsp_callbacks.snapshot import Evaluation, ProbeSet, displaced, flatten

#: Moves of the parameters, relative to their lengths: small for the outputs, large for their rounding.
MOVE = 0.02


def moved_outputs(probes: ProbeSet, before: list[Tensor], vector: Tensor) -> list[Tensor]:
    """``d outputs / d theta`` times a vector, for each part: by a difference, and exactly where rounding hides that.

    Args:
        probes: samples.
        before: the outputs of each part.
        vector: flat.

    Cost: a forward pass over the probes; with exact products it, another one and two backward passes.
    """
    parameters = list(probes.parameters.values())
    known, eps = lengths(parameters), torch.finfo(vector.dtype).eps
    if known is not None and bool(vector.any()):
        distance = MOVE / relative_move(vector, parameters, known)
        with displaced(parameters, vector, distance):
            changes = [part().outputs.detach() - b for part, b in zip(probes.parts, before)]
        if all(4 * eps * float(norm(b)) <= MOVE * float(norm(change)) for b, change in zip(before, changes)):
            return [change / distance for change in changes]
    with double_backward(probes.module):
        return [_exact(part, parameters, vector) for part in probes.parts]


def _exact(part: Callable[[], Evaluation], parameters: list[nn.Parameter], vector: Tensor) -> Tensor:
    outputs = part().outputs
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = flatten(torch.autograd.grad(outputs, parameters, u, create_graph=True, materialize_grads=True), parameters)
    return torch.autograd.grad(pulled, u, vector.to(pulled.dtype), materialize_grads=True)[0]


def differentiated_twice(product: Callable[[Tensor], Tensor], criterion: Callable[[Tensor], Tensor], f: Tensor) -> bool:
    """Whether a product is that of a central difference of the criterion's gradients, at one of some distances.

    Outputs near 0, or far from their targets, say little of how far to go: the first is relative to their size.
    """
    v = torch.randn(f.shape, generator=torch.Generator().manual_seed(0)).to(f)
    precision, size = torch.finfo(f.dtype).eps, float(norm(f)) / f.numel() ** 0.5 or 1.0
    found = product(v)

    def gradient(moved: Tensor) -> Tensor:
        moved = moved.requires_grad_()
        with torch.enable_grad():
            return len(f) * torch.autograd.grad(criterion(moved), moved)[0]

    for far in (1.0, 8.0, 64.0, 512.0, 1 / 8):
        distance = far * 8.7 * precision**0.5 * size
        ahead, behind = (gradient(f.detach() + sign * distance * v) for sign in (1.0, -1.0))
        central = (ahead - behind) / (2 * distance)
        rounding = 4 * precision * float(norm(ahead)) / distance
        defect, change = float(norm(found - central)), float(norm(central))
        if defect <= 0.01 * change + min(rounding, 0.02 * change):
            return True
        if far > 100 and max(change, float(norm(found))) <= rounding:
            return True
    return False
