"""One combination of each sample's outputs that stands for all: the one that moves most as the weights do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.autograd.spread_tensors import is_spread, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.operators.sgd.parameter_gram import wide

#: Products from the last layer's main direction; for more outputs than `FORMED` fewer; without a last layer more.
POWER, POWER_OF_MANY, POWER_ALONE = 8, 3, 20
#: Up to so many outputs K is formed.
FORMED = 256
#: Products with ``W W^T`` that find its top eigenvector.
TOP = 20
#: The smallest number of float32 with all its digits.
TINY = float(np.finfo(np.float32).tiny)


class OutputMetric:
    """How far the weights move each combination of the outputs, as their last layer W tells: ``K = I + W W^T / c``.

    The gradients of a sample's outputs have the Gram matrix ``J J^T``: of the last layer it is a multiple of the
    identity, and what lies before it comes through W. The mean of the diagonal of ``W W^T / c`` is 1.

    Args:
        head: W, ``(C, d)``; None is K = I.
        outputs: C.

    Attributes:
        start: the top eigenvector of K, ``(C,)``, nearly; any vector without a last layer.
        power: how many products `rows_of_outputs` takes.
    """

    def __init__(self, head: Tensor | None, outputs: int):
        self.start, self.power = random_start(outputs), POWER_ALONE
        self._head: Tensor | None = None
        self._formed: Array | None = None
        if head is None or outputs == 1:
            return
        head = wide(head.detach().flatten(1))
        size = float(head.square().sum())
        if not 0 < size < np.inf:
            return
        self._head, self._share = head, outputs / size
        self.power = POWER if outputs <= FORMED else POWER_OF_MANY
        if outputs <= FORMED:
            self._formed = (head @ head.T).cpu().numpy() * self._share
            self.start = np.linalg.eigh(self._formed)[1][:, -1]
            self._formed[np.diag_indices(outputs)] += 1
            return
        for _ in range(TOP):
            image = self._of_head(self.start)
            self.start = image / max(float(np.abs(image).max()), TINY)

    def _of_head(self, v: Array) -> Array:
        if self._formed is not None:
            return v @ self._formed
        assert self._head is not None
        moved = torch.from_numpy(v).to(self._head)
        return ((moved @ self._head) @ self._head.T).cpu().numpy() * self._share

    def __call__(self, v: Array) -> Array:
        """Return K v, of vectors ``(..., C)``."""
        if self._head is None:
            return v
        return self._of_head(v) if self._formed is not None else v + self._of_head(v)


def last_layer(parameters: Mapping[str, Tensor], outputs: int) -> Tensor | None:
    """Return the last of the matrices with a row for each output; None where there is none.

    A matrix that is spread over processes is gathered: all of them come here together.
    """
    matrices = [p for p in parameters.values() if p.ndim > 1 and len(p) == outputs]
    if not matrices:
        return None
    return whole(matrices[-1]) if is_spread(matrices[-1]) else matrices[-1]


def rows_of_outputs(product: Callable[[Array], Array], shape: tuple[int, ...], metric: OutputMetric) -> Array:
    """Return ``S v / sqrt(v^T S v)``, ``(..., C)``, v nearly the top eigenvector of ``K S``, for each S.

    ``z = J^T S v / sqrt(v^T S v)`` is a row with ``z z^T <= J^T S J``, whatever v is, and equal to it along a direction
    of the weights that moves the outputs along v. Where S has one large eigenvalue it is the top eigenpair. Where
    eigenvalues are alike, as at the start with many classes, samples keep what they have in common: all begin at the
    top eigenvector of K, which is that of the weights.

    Args:
        product: ``v -> S v``, S the output Hessian of each sample.
        shape: of the outputs, ``(..., C)``.
        metric: K.

    Raises:
        Unmeasurable: if a Hessian is negative along v.

    Cost: `OutputMetric.power` products with S and K.
    """
    v = np.broadcast_to(metric.start, shape).copy()
    for _ in range(metric.power):
        v = metric(product(v))
        v = v / np.maximum(np.abs(v).max(-1), TINY)[..., None]
    image = product(v)
    values = (v * image).sum(-1)
    require_convex(float(values.min()), float(values.max()))
    return image / np.sqrt(np.where(values > TINY, values, np.inf))[..., None]


def softmax_rows(p: Array, weights: Array, metric: OutputMetric, squares: Array | None = None) -> Array:
    """Return `rows_of_outputs` of ``w (diag(p) - p p^T) + q p p^T``, the output Hessian of cross-entropy.

    With a z-loss beside it, that is of a cross-entropy of weight ``w - q z`` and of ``q z^2 / 2``, z the log-sum-exp of
    the outputs, of which p is the gradient.

    Args:
        p: probabilities, ``(..., C)``.
        weights: w, ``(...)``.
        metric: K.
        squares: q, ``(...)``; None is 0.

    Raises:
        Unmeasurable: as there.
    """
    likely = np.arange(0, p.size, p.shape[-1]).reshape(p.shape[:-1]) + p.argmax(-1)  # its place among all entries
    others = p.copy()
    others.put(likely, 0)
    variance = np.maximum(others.sum(-1), TINY)[..., None]  # of the likeliest class, nearly: by it nothing underflows
    share = p / variance
    weighted = weights[..., None] * share

    def product(v: Array) -> Array:
        beside = v - v.take(likely)[..., None]  # where p is nearly 1 the two terms would cancel
        image = weighted * (beside - (p * beside).sum(-1)[..., None])
        return image if squares is None else image + (squares * (p * v).sum(-1))[..., None] * share

    return rows_of_outputs(product, p.shape, metric) * np.sqrt(variance)


@lru_cache(maxsize=4)
def random_start(outputs: int) -> Array:
    """Return a random vector, the same one each time."""
    return torch.randn(outputs, generator=torch.Generator().manual_seed(0)).numpy()


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
