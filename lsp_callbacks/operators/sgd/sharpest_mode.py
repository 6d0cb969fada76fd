"""The top eigenvector of the Gauss-Newton matrix, and how it moves each output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.double_backward import jacobian
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.linalg import norm, unit
from lsp_callbacks.operators.sgd.output_hessian import Product, output_hessian
from lsp_callbacks.step.criterion import Evaluation
from lsp_callbacks.step.flat import displaced, flatten
from lsp_callbacks.step.probe_set import ProbeSet

#: Products that find the mode from a random start, and from the last mode.
COLD, WARM = 20, 3
#: Displacement for differences, as a share of the parameters' norm: small for outputs, large for their rounding.
SHARE = 1e-3


def sharpest_mode(
    probes: ProbeSet, scale: Mapping[str, float | Tensor], mode: Tensor | None, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """Return how each output moves along the sharpest mode, part by part, and the mode, by power iteration.

    Args:
        probes: the samples.
        scale: the diagonal of D, by parameter name; the mode is the top eigenvector of D times the matrix.
        mode: the start, an earlier mode; None starts at random.
        generator: of the random start.

    Cost: one forward and four backward passes over the probes for each product.
    """
    parameters = list(probes.parameters.values())
    weights = [torch.as_tensor(scale[name]).to(p).expand_as(p) for name, p in probes.parameters.items()]
    d = flatten(weights, parameters)
    if mode is not None and not bool(mode.any()):
        mode = None
    steps = COLD if mode is None else WARM
    vector = torch.randn(len(d), generator=generator).to(d) if mode is None else mode
    kept = [_linearised(probes.parts[0], parameters)] if len(probes.parts) == 1 else []  # not all graphs at once
    for _ in range(steps):
        moves, image = [], torch.zeros_like(vector)
        for evaluation, push in kept or (_linearised(part, parameters) for part in probes.parts):
            moves.append(push(vector))
            curved = output_hessian(evaluation)(moves[-1])
            pulled = torch.autograd.grad(
                evaluation.outputs, parameters, curved, retain_graph=bool(kept), materialize_grads=True
            )
            image += flatten(pulled, parameters)
        if not bool((d * image).any()):  # dead, or saturated: no direction moves the outputs, and any will do
            break
        vector = unit(d * image)
    return moves, vector


def _linearised(part: Callable[[], Evaluation], parameters: list[nn.Parameter]) -> tuple[Evaluation, Product]:
    """Return a forward pass, and ``v -> J v`` of its outputs.

    With functions whose backward may have no derivative J is a difference, over a share of the parameters' size.
    """
    evaluation = part()
    f = evaluation.outputs
    if not read(f.sum()).custom:
        with contextlib.suppress(RuntimeError):  # no second derivative is implemented
            J = jacobian(f, parameters)
            _ = J @ torch.zeros(J.shape[1], dtype=J.dtype, device=J.device)
            return evaluation, lambda v: (J @ v).to(f.dtype).view_as(f)
    size = float(norm(flatten([p.detach() for p in parameters], parameters))) or 1.0

    def difference(v: Tensor) -> Tensor:
        distance = SHARE * size / float(norm(v))
        with displaced(parameters, v, distance):
            return (part().outputs.detach() - f.detach()) / distance

    return evaluation, difference
