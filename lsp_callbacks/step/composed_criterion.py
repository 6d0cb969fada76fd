"""Outputs and criterion of a loss that is a sum: of chunks of tokens, squares of log-sum-exps, a balance of experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import saved
from lsp_callbacks.autograd.chunked_outputs import chunk_places, linear_head
from lsp_callbacks.autograd.graph_pull import UnknownGraph, outputs_first, plain_kinds
from lsp_callbacks.autograd.loss_terms import LOG_SOFTMAX, Term, is_last_axis, read_terms


def composed(loss: Tensor, logits: Iterable[Tensor], samples: int | None) -> tuple[Tensor, Composed]:
    """Return the outputs of a loss, ``(N, T, C)`` with their graph, and the loss as a function of them.

    Terms that are linear in the probabilities of another softmax (a router's) are left out, as they have no curvature
    in these; see `read_terms`.

    Args:
        loss: with its graph.
        logits: tensors that criteria were called with, among which are the outputs.
        samples: N; None takes each row for a sample.

    Raises:
        UnknownGraph: for other losses.
    """
    nodes = outputs_first(loss.grad_fn)
    terms = read_terms(nodes, plain_kinds(nodes))
    if any(term.node.name() != LOG_SOFTMAX or not is_last_axis(term.node) for term in terms):
        raise UnknownGraph("the loss is no cross-entropy over the last axis")
    logits_by_node = {(t.grad_fn, t.output_nr): t for t in logits}
    parts = []
    for term in terms:
        part = logits_by_node.get(term.node.next_functions[0])
        if part is None:
            raise UnknownGraph("a softmax of what is not given to a known criterion")
        parts.append(part.reshape(-1, part.shape[-1]))
    flat, places, total = parts[0], [torch.arange(len(parts[0]))], len(parts[0])
    if len(parts) > 1:
        places, total = chunk_places([linear_head(term.node.next_functions[0][0]) for term in terms])
        flat = flat.new_zeros(total, flat.shape[1])
        flat = flat.index_put((torch.cat(places).to(flat.device),), torch.cat(parts))
    n = samples or total
    if total % n:
        raise UnknownGraph(f"{total} outputs cannot be divided among {n} samples")
    return flat.reshape(n, total // n, -1), Composed(terms, places)


class Composed:
    """A loss as a function of outputs: ``-<t, log softmax f> + <c, logsumexp(f)^2>``, chunk by chunk.

    Args:
        terms: of the loss.
        places: of the rows of each among those of the outputs.
    """

    def __init__(self, terms: list[Term], places: list[Tensor]):
        self._parts = []
        for term, place in zip(terms, places):
            shape = saved["result"](term.node).shape
            self._parts.append((term.slope.expand(shape).reshape(-1, shape[-1]).detach(), term.squares, place))

    def __call__(self, f: Tensor) -> Tensor:
        """Return the loss, up to a constant."""
        flat, total = f.reshape(-1, f.shape[-1]), f.new_zeros(())
        for slope, squares, place in self._parts:
            part = flat[place.to(flat.device)]
            total = total + (slope.to(part) * F.log_softmax(part, -1)).sum()
            if squares is not None:
                total = total + (squares.to(part) * part.logsumexp(-1).square()).sum()
        return total
