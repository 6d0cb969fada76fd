"""The Jacobian of a network's outputs with respect to its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import check_adjoint, double_backward, jacobian
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.step.probe_set import ProbeSet


def output_jacobian(probes: ProbeSet, *, samples: int) -> LinearOperator:
    """Return ``N^(-1/2) d outputs / d theta`` at the first N probes, in eval mode; all outputs of all positions, flat.

    So ``||J v||`` is the root mean square over the probes of how far ``v`` moves the outputs of one.

    Args:
        probes: parts are used until they hold ``samples``, each as a whole.
        samples: at least so many, or all.

    Returns:
        ``(m, P)``.

    Raises:
        Unmeasurable: outputs that cannot be inferred from the loss, or not be differentiated twice.

    Cost: a forward pass and three backward passes, then one for each product, and the memory of their graph.
    """
    outputs: list[Tensor] = []
    with double_backward(probes.module):
        for part in probes.parts:
            outputs.append(part().outputs)
            if sum(map(len, outputs)) >= samples:
                break
        values = torch.cat([part.flatten() for part in outputs])
        J = jacobian(values, list(probes.parameters.values()))
    check_adjoint(J, read(values), "the network")
    return sum(map(len, outputs)) ** -0.5 * J
