"""The top eigenpair of the output Hessian of cross-entropy with a z-loss beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.operators.sgd.parameter_gram import wide
from lsp_callbacks.operators.sgd.softmax_pairs import POWER, SQUARED, SQUARINGS, require_convex


def log_sum_pairs(p: Tensor, weights: Tensor, squares: Tensor) -> Tensor:
    """Return ``sqrt(s) u`` of the top eigenpair of ``w (diag(p) - p p^T) + q p p^T``, by a power of it.

    That is the Hessian of a cross-entropy of weight ``w - q z`` and of ``q z^2 / 2``, z the log-sum-exp of the outputs,
    of which p is the gradient.

    Args:
        p: probabilities, ``(..., C)``.
        weights: w, ``(...)``.
        squares: q, ``(...)``.

    Raises:
        Unmeasurable: if the matrix is not positive.
    """
    p = wide(p)
    w, q = weights.to(p)[..., None], squares.to(p)[..., None]
    likely = p.argmax(-1, keepdim=True)

    def product(v: Tensor) -> Tensor:
        beside = v - v.gather(-1, likely)  # where p is nearly 1 the two terms of the variance would cancel
        return p * (w * (beside - (p * beside).sum(-1, keepdim=True)) + q * (p * v).sum(-1, keepdim=True))

    v = torch.randn(p.shape[-1], generator=torch.Generator().manual_seed(0)).to(p).expand_as(p)
    for _ in range(2**SQUARINGS + 1 if p.shape[-1] <= SQUARED else POWER):
        v = product(v)
        v = v / v.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    u = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    values = (u * product(u)).sum(-1, keepdim=True)
    require_convex(float(values.min()), float(values.abs().max()))
    return u * values.clamp_min(0) ** 0.5
