"""The Hessian of a criterion with respect to the network's outputs, and its eigenpairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import once_differentiable
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.curvature.second_derivative_check import criterion_agrees
from lsp_callbacks.operators.sgd.output_rows import require_convex
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


@dataclass(frozen=True)
class OutputCurvature:
    """The output Hessians of all samples at some positions.

    Attributes:
        product: ``v -> S v``, ``(N, k, C)``.
        weights: ``w`` where ``S = w (diag(p) - p p^T)``, ``p`` the softmax of the outputs, or ``S = w``; ``(N, k)``.
        p: ``(N, k, C)``; None where S is no such matrix.
    """

    product: Product
    weights: Tensor | None = None
    p: Tensor | None = None

    @property
    def is_multiple(self) -> bool:
        """Whether each S is a multiple of the identity."""
        return self.weights is not None and self.p is None

    def matrices(self, shape: torch.Size) -> Tensor:
        """Return S of each sample and position, ``(N, k, C, C)``."""
        if self.weights is None:
            return blocks(self.product, torch.empty(shape, dtype=torch.float64))
        eye = torch.eye(shape[-1]).to(self.weights)
        inner = eye
        if self.p is not None:  # the diagonal p (1 - p) from the others, as 1 - p has no digits where p is nearly 1
            inner = (eye - 1) * self.p[..., None] * self.p[..., None, :]
            inner = inner - torch.diag_embed(inner.sum(-1))
        return self.weights[..., None, None] * inner


def output_curvature(evaluation: Evaluation, positions: Tensor) -> OutputCurvature:
    """Return the output Hessians at some positions, in closed form for cross-entropy and squares.

    Which criterion it is, and with which weights (of ignored labels, of padding), is read off one product with a random
    vector: where ``S v`` is ``w (p v - p <p, v>)`` or ``w v`` for it, S is that matrix. No further product is then a
    backward pass through the criterion.

    Args:
        evaluation: outputs of N samples, with the criterion.
        positions: k of each sample, ``(N, k)``.

    Raises:
        Unmeasurable: see `output_hessian`.
    """
    whole, f = output_hessian(evaluation), evaluation.outputs.detach()
    everywhere = positions.shape[1] == f.shape[1]

    def product(v: Tensor) -> Tensor:
        if everywhere:
            return whole(v)
        place = positions[..., None].expand(-1, -1, f.shape[-1])
        return at(whole(torch.zeros_like(f).scatter_(1, place, v.to(f))), positions)

    here = f if everywhere else at(f, positions)
    v = torch.randn(here.shape, generator=torch.Generator().manual_seed(1)).to(here)
    image = product(v)
    p = here.softmax(-1)
    if (weights := _multiple(image, v)) is not None:
        w = weights[..., None]
        return OutputCurvature(lambda u: w * u, weights)

    likely = p.argmax(-1, keepdim=True)

    def centred(u: Tensor) -> Tensor:
        # Relative to the likeliest class: where p is nearly 1 the two terms would cancel.
        beside = u - u.gather(-1, likely)
        return p * (beside - (p * beside).sum(-1, keepdim=True))

    if (of_softmax := _multiple(image, centred(v))) is not None:
        scale = of_softmax[..., None]
        return OutputCurvature(lambda u: scale * centred(u), of_softmax, p)
    return OutputCurvature(product)


def counted_positions(evaluation: Evaluation) -> Tensor | None:
    """Return at which positions the criterion has a curvature, ``(N, T)``; None where it has at all of them.

    It has none where labels are ignored or masked. Cost: a product with the Hessian of the criterion.
    """
    f = evaluation.outputs.detach()
    v = torch.randn(f.shape, generator=torch.Generator().manual_seed(2)).to(f)
    counts = (output_hessian(evaluation)(v) != 0).any(-1)
    return None if bool(counts.all()) else counts.cpu()


def at(outputs: Tensor, positions: Tensor) -> Tensor:
    """Return the outputs of each sample at some positions of its own, ``(N, k, C)``."""
    return outputs.gather(1, positions[..., None].expand(-1, -1, outputs.shape[-1]))


def _multiple(image: Tensor, like: Tensor) -> Tensor | None:
    """Return the factors by which ``image`` is a multiple of ``like`` at each position; None where it is none."""
    dtype = image.dtype
    image, like = image.double(), like.double()  # whose squares are in range
    inner, size = (image * like).sum(-1), like.square().sum(-1)
    clear = size > 1e-12 * size.max()
    weights = torch.where(clear, inner / torch.where(clear, size, 1.0), 0.0)
    if not bool(clear.all()):  # a saturated output: rounding would be its factor
        some = weights[clear & (weights != 0)]
        typical = some.median() if len(some) else weights.sum()
        weights = torch.where(~clear & (image != 0).any(-1), typical, weights)
    error = (image - weights[..., None] * like).abs().amax()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
    return weights.to(dtype) if bool(error <= tolerance * image.abs().amax()) else None


def blocks(curvature: Product, outputs: Tensor) -> Tensor:
    """Return S of each sample and position as a matrix, ``(..., classes, classes)``."""
    return torch.stack([curvature(e.expand_as(outputs)) for e in torch.eye(outputs.shape[-1]).to(outputs)], dim=-1)


def all_pairs(matrices: Tensor) -> list[Tensor]:
    """Return ``sqrt(s_k) u_k`` for every eigenpair k: the columns of ``S^(1/2)`` at each position.

    Raises:
        Unmeasurable: if an eigenvalue is negative.
    """
    wide = matrices if matrices.element_size() > 2 else matrices.float()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    return list((vectors * root(values, values)[..., None, :]).to(matrices).unbind(-1))


def root(values: Tensor, scale: Tensor) -> Tensor:
    """Return the square roots of eigenvalues; small negative ones, relative to ``scale``, count as 0.

    Raises:
        Unmeasurable: if an eigenvalue is negative beyond rounding.
    """
    require_convex(float(values.min()), float(scale.abs().max()))
    return values.clamp_min(0) ** 0.5
