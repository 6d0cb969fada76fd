"""The criterion at the root of a step's own graph: the outputs that it takes, and their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import saved
from lsp_callbacks.autograd.chunked_outputs import chunk_places, linear_head
from lsp_callbacks.autograd.graph_pull import UnknownGraph, pull, summed
from lsp_callbacks.autograd.loss_terms import (
    BILINEAR,
    LINEAR,
    LOG_SOFTMAX,
    LOGISTIC,
    SQUARE,
    Term,
    is_last_axis,
    read_terms,
)
from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.operators.sgd.output_rows import OutputMetric, softmax_rows
from lsp_callbacks.operators.sgd.parameter_gram import wide

#: How many samples the others are compared with: where nine of ten are the same, one of three is among them.
FEW, MOST = 3, 0.9


class OutputsAt(NamedTuple):
    """Outputs at k positions of each of N samples.

    Attributes:
        p: the probabilities, ``(N, k, C)``; None where there are none.
        weights: w, see `GraphCriterion`, ``(N, k)``.
        sizes: the top eigenvalue of the Hessian, up to a factor 2, summed over the positions, ``(N,)``. That of
            ``diag(p) - p p^T`` lies between its largest diagonal entry and, by Gershgorin's discs, twice that.
        alike: whether nine of ten samples may have the same outputs, to rounding.
        squares: q, see `GraphCriterion`; None where it is 0.
    """

    p: Array | None
    weights: Array
    sizes: Array
    alike: bool
    squares: Array | None = None


class Chunk(NamedTuple):
    """A last layer that computes some of the outputs.

    Attributes:
        head: its node.
        at: which of its rows each of the ``N T`` outputs is; -1 where it is none.
    """

    head: Any
    at: Tensor


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
        squares: q, ``(N, T)``, where the Hessian is ``w (diag(p) - p p^T) + q p p^T``, see `softmax_rows`; None is 0.
        chunks: of outputs that come from several calls of the last layer.
    """

    node: Any
    outputs: Tensor
    weights: Tensor
    is_softmax: bool
    shape: torch.Size
    axis: int
    squares: Tensor | None = None
    chunks: tuple[Chunk, ...] = ()

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
        sizes = -weights * (p * np.expm1(outputs)).min(-1)
        if self.squares is None:
            return OutputsAt(p, weights, sizes.sum(1), alike)
        squares = wide(self._at(self.squares, positions)).cpu().numpy()
        return OutputsAt(p, weights, (sizes + squares * (p * p).sum(-1)).sum(1), alike, squares)

    def rows(self, outputs: OutputsAt, taken: Array, stands: Array, metric: OutputMetric) -> Tensor:
        """Return `softmax_rows` of some samples, or the root of w, ``(n, k, C)``, times a factor."""
        weights = outputs.weights[taken]
        if outputs.p is None:
            rows = weights[..., None] ** 0.5
        else:
            squares = None if outputs.squares is None else outputs.squares[taken]
            rows = softmax_rows(outputs.p[taken], weights, metric, squares)
        scaled = torch.from_numpy(rows * stands[:, None, None].astype(rows.dtype))
        return scaled if self.outputs.is_cpu else scaled.to(self.outputs.device)

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
    place = next((k for k, kind in enumerate(kinds) if kind in (LOG_SOFTMAX, SQUARE, LOGISTIC)), None)
    if place is None:
        raise UnknownGraph("the loss is the value of no known criterion")
    node, inside = nodes[place], set(nodes[: place + 1])
    is_single = all(
        (kind in LINEAR or (kind in BILINEAR and sum(child is not None for child, _ in above.next_functions) == 1))
        and inside.issuperset(child for child, _ in above.next_functions if child is not None)
        and not (kind.startswith("NllLoss") and saved["weight"](above) is not None)
        for above, kind in zip(nodes[:place], kinds)
    )
    if is_single:
        result = saved["result" if kinds[place] == LOG_SOFTMAX else "self"](node)
        seed = result.new_full((), samples / factor)
        return _of_term(node, pull(nodes[:place], {nodes[0]: seed}, None, summed)[node][0], samples)
    terms = read_terms(nodes, kinds)
    if len(terms) == 1 and terms[0].squares is None:
        return _of_term(terms[0].node, terms[0].slope * (samples / factor), samples)
    return _of_terms(terms, samples, samples / factor)


def _of_term(node: Any, slope: Tensor, samples: int) -> GraphCriterion:
    """Return the criterion of a node, from N times the slope of the loss in it."""
    is_softmax = node.name() == LOG_SOFTMAX
    result = saved["result" if is_softmax else "self"](node)
    if is_softmax:
        dim = saved["dim"](node)  # torch keeps negative ones modulo 2^64
        axis = (dim - 2**64 if dim >= 2**63 else dim) % result.ndim
        moved, t = result if axis == result.ndim - 1 else result.movedim(axis, -1), -slope.sum(axis)
        if result.ndim < 2 or len(result) % samples:
            raise UnknownGraph(f"outputs of shape {tuple(result.shape)} cannot be divided among {samples} samples")
        outputs = moved.reshape(samples, -1, result.shape[axis])
        return GraphCriterion(node, outputs, t.reshape(samples, -1), True, result.shape, axis)
    f = result
    if f.numel() != samples:
        raise UnknownGraph("several outputs have no eigenvector of their own")
    reduction = saved["reduction"](node)
    w = slope.expand_as(f) / (f.numel() if reduction == 1 else 1)
    if node.name() == SQUARE:
        w = 2 * w
    elif saved["weight"](node) is not None or saved["pos_weight"](node) is not None:
        raise UnknownGraph("outputs have weights")
    else:
        p = f.sigmoid()
        w = w * p * (1 - p)
    return GraphCriterion(node, f.reshape(samples, 1, 1), w.reshape(samples, 1), False, f.shape, f.ndim - 1)


def _of_terms(terms: list[Term], samples: int, factor: float) -> GraphCriterion:
    """Return the criterion of cross-entropies in chunks, and of the squares of log-sum-exps beside them."""
    results = [saved["result"](term.node) for term in terms]
    classes = results[0].shape[-1]
    if not all(map(is_last_axis, (term.node for term in terms))) or any(r.shape[-1] != classes for r in results):
        raise UnknownGraph("chunks of other outputs, or not over the last axis")
    parts = [result.reshape(-1, classes) for result in results]
    weights = [-factor * term.slope.expand(r.shape).sum(-1).reshape(-1) for term, r in zip(terms, results)]
    total, chunks = len(parts[0]), list[Chunk]()
    order: Tensor | None = None
    if len(terms) > 1:
        heads = [linear_head(term.node.next_functions[0][0]) for term in terms]
        places, total = chunk_places(heads)
        for head, place in zip(heads, places):
            at = torch.full((total,), -1)
            at[place] = torch.arange(len(place))
            chunks.append(Chunk(head, at.to(parts[0].device)))
        order = torch.cat(places).to(parts[0].device)
    if total % samples:
        raise UnknownGraph(f"{total} outputs cannot be divided among {samples} samples")

    def joined(pieces: list[Tensor]) -> Tensor:
        if order is None:
            return pieces[0].reshape(samples, -1, *pieces[0].shape[1:])
        whole = pieces[0].new_zeros(total, *pieces[0].shape[1:])
        return whole.index_copy_(0, order, torch.cat(pieces)).reshape(samples, -1, *pieces[0].shape[1:])

    squares: list[Tensor] = []
    if any(term.squares is not None for term in terms):
        for k, term in enumerate(terms):
            q = torch.zeros_like(weights[k]) if term.squares is None else 2 * factor * term.squares.to(weights[k])
            squares.append(q)
            weights[k] = weights[k] if term.log_sums is None else weights[k] + q * term.log_sums
    shape = results[0].shape if order is None else torch.Size((total, classes))
    return GraphCriterion(
        terms[0].node, joined(parts), joined(weights), True, shape, len(shape) - 1,
        squares=joined(squares) if squares else None, chunks=tuple(chunks),
    )  # fmt: skip
