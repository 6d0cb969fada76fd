"""The top eigenpair of the covariance of a softmax, ``diag(p) - p p^T``, for many samples in few calls."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.operators.sgd.parameter_gram import wide

#: Up to so many classes the matrix itself is squared, to the power 2^k; for more its products, which are linear.
SQUARED, SQUARINGS, POWER = 20, 5, 20
#: The smallest number of float32 with all its digits.
TINY = float(np.finfo(np.float32).tiny)


def softmax_pairs(p: Tensor, weights: Tensor) -> Tensor:
    """Return ``sqrt(s) u`` of the top eigenpair of ``w (diag(p) - p p^T)``, the output Hessian of cross-entropy.

    By a power of the matrix, from one start for all samples: where the eigenvalue is nearly degenerate, as in a network
    that does not know anything yet, they keep what they have in common, and their rows add up as the network's do.

    Args:
        p: probabilities, ``(..., C)``.
        weights: w, ``(...)``.

    Raises:
        Unmeasurable: if a weight is negative.

    Cost: a dozen calls; ``10 C^3`` multiplications for up to 20 classes, ``100 C`` for more.
    """
    p = wide(p)
    weights = weights.to(p)
    if p.shape[-1] > SQUARED:
        return _scaled(_by_products(p, _start(p.shape[-1]).to(p)), p, weights[..., None])
    return torch.from_numpy(pairs_of_few(p.cpu().numpy(), weights.cpu().numpy())).to(p.device)


def pairs_of_few(p: Array, weights: Array) -> Array:
    """Return the same for few classes: from ``A^32 v``, A over its largest diagonal entry, whose top is in [1, 2].

    By numpy: of small matrices the time of a call counts.
    """
    matrix = p[..., None] * -p[..., None, :]
    diagonal = matrix.reshape(*p.shape[:-1], -1)[..., :: p.shape[-1] + 1]
    diagonal[...] = 0  # p (1 - p) from the others, as 1 - p has no digits where p is nearly 1
    variances = -(matrix @ np.ones(p.shape[-1], p.dtype))
    diagonal[...] = variances
    largest = np.maximum(variances.max(-1), TINY)
    matrix /= largest[..., None, None]
    power = matrix
    for _ in range(SQUARINGS):
        power = power @ power
    v = power @ _start(p.shape[-1]).numpy().astype(p.dtype)
    top = weights * largest * (v * (matrix @ v[..., None])[..., 0]).sum(-1)
    require_convex(float(top.min()), float(top.max()))
    return v * (np.sqrt(np.maximum(top, 0)) / ((v * v).sum(-1) + TINY))[..., None]


def _scaled(vector: Tensor, p: Tensor, weights: Tensor) -> Tensor:
    """Return the unit vectors u times the root of w times the variance of u under p."""
    u = vector / ((vector * vector).sum(-1)[..., None] ** 0.5 + TINY)
    beside = u - (p * u).sum(-1)[..., None]
    values = weights * (p * beside * beside).sum(-1)[..., None]
    require_convex(float(values.min()), float(values.max()))
    return u * values.clip(0) ** 0.5


def _by_products(p: Tensor, start: Tensor) -> Tensor:
    """Return ``A^20 v``, each product over the largest p, relative to the likeliest class."""
    largest, likely = p.max(-1, keepdim=True)
    share, vector = p / largest, start.expand_as(p)
    for _ in range(POWER):
        beside = vector - vector.gather(-1, likely)
        vector = share * (beside - (p * beside).sum(-1, keepdim=True))
        vector = vector / vector.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return vector


@lru_cache(maxsize=4)
def _start(classes: int) -> Tensor:
    return torch.randn(classes, generator=torch.Generator().manual_seed(0))


def require_convex(least: float, largest: float) -> None:
    """Raise an error if the least eigenvalue of an output Hessian is negative, beyond rounding of the largest.

    Raises:
        Unmeasurable: if so.
    """
    if least < -1e-4 * largest:
        raise Unmeasurable(
            "the criterion is not convex in the outputs: its Gauss-Newton matrix is not positive semidefinite, and the "
            "exponents of SGD do not follow from a Gram matrix"
        )
