"""The Jacobian of a network's outputs in its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.hessian import double_backward
from lsp_callbacks.operators.sgd.sample_rows import check_adjoint
from lsp_callbacks.step.snapshot import ProbeSet, flatten


def output_jacobian(probes: ProbeSet, *, samples: int) -> LinearOperator:
    """``N^(-1/2) d outputs / d theta`` at the first N probes, in eval mode; all outputs of all positions, flat.

    So ``||J v||`` is the root mean square over the probes of how far ``v`` moves the outputs of one.

    Forward products differentiate the adjoint, which is linear, with respect to its argument; that is checked, as a
    ``torch.autograd.Function`` whose backward cannot be differentiated would give a wrong product without a word.

    Args:
        probes: parts are taken until they hold ``samples``, each as a whole.
        samples: at least so many, or all.

    Returns:
        ``(m, P)``.

    Raises:
        Unmeasurable: outputs that cannot be told from the loss, or not be differentiated twice.

    Cost: a forward pass and three backward passes, then one for each product, and the memory of their graph.
    """
    parameters = list(probes.parameters.values())
    outputs: list[Tensor] = []
    with double_backward(probes.module):
        for part in probes.parts:
            outputs.append(part().outputs)
            if sum(map(len, outputs)) >= samples:
                break
        values = torch.cat([one.flatten() for one in outputs])
        u = torch.zeros_like(values, requires_grad=True)
        pullback = flatten(
            torch.autograd.grad(values, parameters, u, create_graph=True, materialize_grads=True), parameters
        )
    dtype = torch.promote_types(values.dtype, torch.float32)

    def forward(v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(pullback, u, v.to(pullback.dtype), retain_graph=True, materialize_grads=True)
        return product.to(dtype)

    def adjoint(w: Tensor) -> Tensor:
        parts = torch.autograd.grad(values, parameters, w.to(values.dtype), retain_graph=True, materialize_grads=True)
        return flatten(parts, parameters).to(dtype)

    J = LinearOperator((len(values), len(pullback)), forward, adjoint, dtype=dtype, device=values.device)
    check_adjoint(J, values, "the network")
    return sum(map(len, outputs)) ** -0.5 * J
