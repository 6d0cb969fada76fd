"""The top eigenpair of the covariance of a softmax, ``diag(p) - p p^T``, for many samples in few calls."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.operators.sgd.output_hessian import require_convex
from lsp_callbacks.operators.sgd.parameter_gram import wide

#: Up to so many classes the matrix itself is squared, to the power 2^k; for more its products, which are linear.
SQUARED, SQUARINGS, POWER = 20, 5, 20
#: The smallest number of float32 with all its digits.
TINY = float(np.finfo(np.float32).tiny)
Numbers = TypeVar("Numbers", Tensor, Array)


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
    weights, start = weights.to(p)[..., None], _start(p.shape[-1])
    if p.shape[-1] > SQUARED:
        return _scaled(_by_products(p, start.to(p)), p, weights)
    shares = p.cpu().numpy()
    pairs = _scaled(_by_squares(shares, start.to(p.dtype).numpy()), shares, weights.cpu().numpy())
    return torch.from_numpy(pairs).to(p.device)


def _scaled(vector: Numbers, p: Numbers, weights: Numbers) -> Numbers:
    """Return the unit vectors u times the root of w times the variance of u under p."""
    u = vector / ((vector * vector).sum(-1)[..., None] ** 0.5 + TINY)
    beside = u - (p * u).sum(-1)[..., None]
    values = weights * (p * beside * beside).sum(-1)[..., None]
    require_convex(float(values.min()), float(abs(values).max()))
    return u * values.clip(0) ** 0.5


def _by_squares(p: Array, start: Array) -> Array:
    """Return ``A^32 v``, A over its largest diagonal entry: its top eigenvalue is then between 1 and 2.

    By numpy: of small matrices the time of a call counts.
    """
    power = p[..., None] * -p[..., None, :]
    places = np.arange(power.shape[-1])
    power[..., places, places] = 0  # p (1 - p) from the others, as 1 - p has no digits where p is nearly 1
    diagonal = -power.sum(-1)
    power[..., places, places] = diagonal
    power /= np.maximum(diagonal.max(-1), TINY)[..., None, None]
    for _ in range(SQUARINGS):
        power = power @ power
    return power @ start


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
