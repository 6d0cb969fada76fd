"""The Hessian of a criterion with respect to the network's outputs, and its eigenpairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import once_differentiable
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.curvature.second_derivative_check import criterion_agrees
from lsp_callbacks.step.criterion import Evaluation

Product = Callable[[Tensor], Tensor]


def output_hessian(evaluation: Evaluation) -> Product:
    """Return ``v -> S v``: the Hessian of N times the mean loss in the outputs, block by block in the samples.

    Args:
        evaluation: outputs of N samples, with the criterion.

    Raises:
        Unmeasurable: if the criterion is linear in the outputs, or cannot be differentiated twice.
    """
    f = evaluation.outputs.detach().requires_grad_()
    with torch.enable_grad():
        loss = len(f) * evaluation.criterion(f)
        (gradient,) = torch.autograd.grad(loss, f, create_graph=True)
    if not gradient.requires_grad:
        raise Unmeasurable("the criterion is linear in the outputs: it has no curvature, and no Gauss-Newton matrix")

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, f, v.to(gradient), retain_graph=True, materialize_grads=True)[0]

    graph = read(loss)
    if graph.custom and not criterion_agrees(product, evaluation.criterion, f):
        raise once_differentiable(graph, "the criterion", "pass criterion=... without it")
    return product


def blocks(curvature: Product, outputs: Tensor) -> Tensor:
    """Return S of each sample and position as a matrix, ``(..., classes, classes)``."""
    return torch.stack([curvature(e.expand_as(outputs)) for e in torch.eye(outputs.shape[-1]).to(outputs)], dim=-1)


def all_pairs(curvature: Product, outputs: Tensor) -> list[Tensor]:
    """Return ``sqrt(s_k) u_k`` for every eigenpair k: the columns of ``S^(1/2)`` at each position.

    Raises:
        Unmeasurable: if an eigenvalue is negative.
    """
    matrices = blocks(curvature, outputs)
    wide = matrices if matrices.element_size() > 2 else matrices.float()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    return list((vectors * root(values, values)[..., None, :]).to(matrices).unbind(-1))


def root(values: Tensor, scale: Tensor) -> Tensor:
    """Return the square roots of eigenvalues; small negative ones, relative to ``scale``, count as 0.

    Raises:
        Unmeasurable: if an eigenvalue is negative beyond rounding.
    """
    if bool((values < -1e-4 * scale.abs().amax()).any()):
        raise Unmeasurable(
            "the criterion is not convex in the outputs: its Gauss-Newton matrix is not positive semidefinite, and the "
            "exponents of SGD do not follow from a Gram matrix"
        )
    return values.clamp_min(0) ** 0.5
