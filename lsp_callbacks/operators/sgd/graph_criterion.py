"""The criterion at the root of a step's own graph: the outputs that it takes, and their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import saved
from lsp_callbacks.autograd.graph_pull import UnknownGraph, pull, summed
from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.operators.sgd.parameter_gram import wide
from lsp_callbacks.operators.sgd.softmax_pairs import SQUARED, pairs_of_few, softmax_pairs

#: How many samples the others are compared with: where nine of ten are the same, one of three is among them.
FEW, MOST = 3, 0.9
#: Nodes that are linear in what depends on the parameters, between a loss and its criterion. Of the second kind, where
#: one factor alone depends on them.
_LINEAR = {
    "NllLossBackward0", "NllLoss2DBackward0", "AddBackward0", "SubBackward0", "NegBackward0", "SumBackward0",
    "SumBackward1", "MeanBackward0", "MeanBackward1", "ViewBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "ToCopyBackward0", "CloneBackward0", "MaskedFillBackward0",
}  # fmt: skip
_BILINEAR = {"MulBackward0", "DivBackward0", "MulBackward1", "DivBackward1"}
_LOG_SOFTMAX, _SQUARE, _LOGISTIC = "LogSoftmaxBackward0", "MseLossBackward0", "BinaryCrossEntropyWithLogitsBackward0"


class OutputsAt(NamedTuple):
    """Outputs at k positions of each of N samples.

    Attributes:
        p: the probabilities, ``(N, k, C)``; None where there are none.
        weights: w, see `GraphCriterion`, ``(N, k)``.
        sizes: the top eigenvalue of the Hessian, up to a factor 2, summed over the positions, ``(N,)``. That of
            ``diag(p) - p p^T`` lies between its largest diagonal entry and, by Gershgorin's discs, twice that.
        alike: whether nine of ten samples may have the same outputs, to rounding.
    """

    p: Array | None
    weights: Array
    sizes: Array
    alike: bool


@dataclass(frozen=True)
class GraphCriterion:
    """Outputs of N samples, and the Hessian of N times the mean loss in them, ``w (diag(p) - p p^T)`` or w.

    Attributes:
        node: of the graph, whose first input are the outputs.
        outputs: ``(N, T, C)`` of T positions; log-probabilities where there are probabilities.
        weights: w, ``(N, T)``.
        is_softmax: whether p is the exponential of the outputs; otherwise the Hessian is w.
        shape: of the outputs as the criterion takes them.
        axis: of the classes in that.
    """

    node: Any
    outputs: Tensor
    weights: Tensor
    is_softmax: bool
    shape: torch.Size
    axis: int

    @property
    def counts(self) -> Tensor | None:
        """Whether the loss counts each position, ``(N, T)`` on the CPU; None where it counts all of them."""
        counts = self.weights != 0
        return None if bool(counts.all()) else counts.cpu()

    @np.errstate(all="ignore")  # what is not finite is seen in the result
    def at(self, positions: Tensor) -> OutputsAt:
        """Return what is looked at, at some positions of each sample, ``(N, k)``.

        By numpy: of few outputs the time of a call counts.
        """
        at, of_loss = self._at(self.outputs, positions), self._at(self.weights, positions)
        outputs, weights = wide(at).cpu().numpy(), wide(of_loss).cpu().numpy()
        alike = _is_alike(outputs.reshape(len(outputs), -1), 8 * torch.finfo(self.outputs.dtype).eps)
        if not self.is_softmax:
            return OutputsAt(None, weights, weights.sum(1), alike)
        p = np.exp(outputs)  # 1 - p has no digits where p is near 1
        return OutputsAt(p, weights, -(weights * (p * np.expm1(outputs)).min(-1)).sum(1), alike)

    def pairs(self, outputs: OutputsAt, taken: Array, stands: Array) -> Tensor:
        """Return ``sqrt(s) u`` of the top eigenpair of the Hessian of some samples, ``(n, k, C)``, times a factor."""
        here, factor = self.outputs, stands[:, None, None]
        if outputs.p is None:
            pairs = outputs.weights[taken][..., None] ** 0.5
        elif outputs.p.shape[-1] <= SQUARED:
            pairs = pairs_of_few(outputs.p[taken], outputs.weights[taken])
        else:
            p, weights = (torch.from_numpy(t[taken]).to(here.device) for t in (outputs.p, outputs.weights))
            return softmax_pairs(p, weights) * torch.from_numpy(factor).to(p)
        scaled = torch.from_numpy(pairs * factor.astype(pairs.dtype))
        return scaled if here.is_cpu else scaled.to(here.device)

    @staticmethod
    def _at(t: Tensor, positions: Tensor) -> Tensor:
        """Return some positions, ``(n, k)``, of ``(n, T, ...)``."""
        if t.shape[1] == positions.shape[1] == 1:
            return t
        return t.gather(1, positions.view(*positions.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:]))

    def cotangent(self, values: Tensor, position: Tensor, taken: Tensor) -> Tensor:
        """Return values at one position of some samples, ``(n, C)`` and ``(n,)``, as a tensor of the outputs' shape."""
        n, length, classes = self.outputs.shape
        whole = values.new_zeros(n, length, classes)
        whole[taken, position] = values
        if self.axis == len(self.shape) - 1 or len(self.shape) == 1:
            return whole.view(self.shape)
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        return whole.view(*rest, classes).movedim(-1, self.axis)


def _is_alike(outputs: Array, rounding: float) -> bool:
    """Return whether nine of ten samples may have the same outputs, to rounding."""
    first, most = outputs[:, 0].tolist(), rounding * float(max(outputs.max(), -outputs.min()))

    def tells_apart(value: float) -> bool:
        allowed = (1 - MOST) * len(first)
        for other in first:
            allowed -= not abs(other - value) <= most
            if allowed < 0:
                return True
        return False

    if all(map(tells_apart, first[:FEW])):  # nearly always the first outputs of a dozen samples do
        return False
    largest = np.abs(outputs).max(1)
    same = np.abs(outputs[:FEW, None] - outputs).max(-1) <= rounding * largest
    return bool((same.sum(1) >= MOST * len(outputs)).any())


def read_criterion(nodes: list[Any], kinds: Sequence[str], samples: int, factor: float) -> GraphCriterion:
    """Return the one criterion that a loss is the value of.

    A loss that is linear in the log-probabilities, ``-sum_c t_c log p_c``, has the Hessian ``sum_c t_c (diag(p) - p
    p^T)`` at each position, whatever makes t: labels, smoothed or mixed ones, padding that is left out. So t is the
    gradient of the loss in the log-probabilities.

    Args:
        nodes: of the loss's graph, outputs first.
        kinds: their names.
        samples: N.
        factor: by which the loss was multiplied since it was the mean over these samples.

    Raises:
        UnknownGraph: for other losses, and for squares and logits with several outputs.
    """
    place = next((k for k, kind in enumerate(kinds) if kind in (_LOG_SOFTMAX, _SQUARE, _LOGISTIC)), None)
    if place is None:
        raise UnknownGraph("the loss is the value of no known criterion")
    node, inside = nodes[place], set(nodes[: place + 1])
    for above, kind in zip(nodes[:place], kinds):
        children = [child for child, _ in above.next_functions if child is not None]
        if not (kind in _LINEAR or (kind in _BILINEAR and len(children) == 1)) or not inside.issuperset(children):
            raise UnknownGraph(f"the loss is not the value of one criterion: {kind}")
        if kind.startswith("NllLoss") and saved(above, "weight") is not None:
            raise UnknownGraph("classes have weights")
    is_softmax = kinds[place] == _LOG_SOFTMAX
    result = saved(node, "result" if is_softmax else "self")
    seed = result.new_full((), samples / factor)
    slope = pull(nodes[:place], {nodes[0]: seed}, None, summed)[node][0]
    if is_softmax:
        dim = saved(node, "dim")  # torch keeps negative ones modulo 2^64
        axis = (dim - 2**64 if dim >= 2**63 else dim) % result.ndim
        moved, t = result if axis == result.ndim - 1 else result.movedim(axis, -1), -slope.sum(axis)
        if result.ndim < 2 or len(result) % samples:
            raise UnknownGraph(f"outputs of shape {tuple(result.shape)} cannot be divided among {samples} samples")
        outputs = moved.reshape(samples, -1, result.shape[axis])
        return GraphCriterion(node, outputs, t.reshape(samples, -1), True, result.shape, axis)
    f = result
    if f.numel() != samples:
        raise UnknownGraph("several outputs have no eigenvector of their own")
    reduction = saved(node, "reduction")
    w = slope.expand_as(f) / (f.numel() if reduction == 1 else 1)
    if kinds[place] == _SQUARE:
        w = 2 * w
    elif saved(node, "weight") is not None or saved(node, "pos_weight") is not None:
        raise UnknownGraph("outputs have weights")
    else:
        p = f.sigmoid()
        w = w * p * (1 - p)
    return GraphCriterion(node, f.reshape(samples, 1, 1), w.reshape(samples, 1), False, f.shape, f.ndim - 1)
