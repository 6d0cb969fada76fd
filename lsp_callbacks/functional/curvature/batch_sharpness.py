"""The curvature that SGD's own steps feel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, norm, unit


@dataclass(frozen=True)
class BatchSharpnessResult:
    """Two means, over batches, of ``g^T H_B g`` and ``||g||^2``, with standard errors.

    Attributes:
        mean_of_ratios: ``E[g^T H_B g / ||g||^2]`` (Andreyev & Beneventano).
        mean_of_ratios_error: NaN for a single batch.
        ratio_of_means: ``E[g^T H_B g] / E ||g||^2``: 2 / lr exactly when one step leaves the expected loss of its own
            batch unchanged, in the quadratic model.
        ratio_of_means_error: by the delta method.
        batches: how many.
    """

    mean_of_ratios: Tensor
    mean_of_ratios_error: Tensor
    ratio_of_means: Tensor
    ratio_of_means_error: Tensor
    batches: int


def curvature_along_gradient(hessian: LinearOperator, gradient: Tensor) -> Tensor:
    """Return ``(g^T H_B g, ||g||^2)`` of one batch, in float64.

    Args:
        hessian: ``H_B``, the Hessian of the batch's loss, ``(P, P)``.
        gradient: g, the gradient of the same loss, ``(P,)``.

    Returns:
        ``(2,)``, on the CPU.

    Raises:
        Unmeasurable: where the gradient is not finite, or vanishes.

    Cost: one Hessian product.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import curvature_along_gradient
        >>> from lsp_callbacks.linalg import from_matrix
        >>> curvature_along_gradient(from_matrix(torch.diag(torch.tensor([3.0, 1.0]))), torch.tensor([2.0, 0.0]))
        tensor([12.,  4.], dtype=torch.float64)
    """
    size = norm(gradient)
    if not bool(size.isfinite()):
        raise Unmeasurable("the gradient of this step is not finite: batch sharpness needs a finite one")
    if not bool(size > 0):
        raise Unmeasurable("the gradient of this step is zero: there is no direction to measure the curvature along")
    along = unit(gradient)
    curvature = torch.dot(along.double(), (hessian @ along).double())
    return torch.stack([curvature * size.square(), size.square()]).cpu()


def batch_sharpness(pairs: Tensor) -> BatchSharpnessResult:
    """Return the means of `curvature_along_gradient` over batches, with their standard errors.

    Neither mean is the mean-square edge of SGD: for curvatures 1 and 3 at batch size 1 that is 2 / lr = 2.5, and these
    are 2 and 2.8. One batch has a relative standard deviation of some 40 %.

    Args:
        pairs: ``(batches, 2)``.

    Source: Andreyev & Beneventano 2024; docs/theory.md, section Edges of stability.

    Example:
        >>> import torch
        >>> result = batch_sharpness(torch.tensor([[1.0, 1.0], [27.0, 9.0]]))  # a^3 and a^2 for a = 1, 3
        >>> float(result.mean_of_ratios), float(result.ratio_of_means)
        (2.0, 2.8)
    """
    top, below = pairs.double().unbind(-1)
    n = len(pairs)
    ratios, ratio, mean = top / below, top.sum() / below.sum(), below.mean()
    return BatchSharpnessResult(
        mean_of_ratios=ratios.mean(),
        mean_of_ratios_error=ratios.std() / n**0.5,
        ratio_of_means=ratio,
        ratio_of_means_error=((top - ratio * below) / mean).std() / n**0.5,
        batches=n,
    )
