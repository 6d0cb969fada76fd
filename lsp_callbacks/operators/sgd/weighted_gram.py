"""Gram matrix of outer products behind a preconditioner, exact for few weights and by rows and columns for many."""

from __future__ import annotations

import torch
from torch import Tensor

#: Weights of a layer up to which each of them is multiplied for each pair of rows.
FEW = 2**14
#: So often the matrix, of few rows, is squared to find the direction of its largest eigenvalue.
SQUARINGS = 4
#: How many numbers at a time stay in the processor's cache.
BLOCK = 2**19


def weighted_gram(g: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """Return ``K_ij = sum_kl D_kl g_ik g_jk a_il a_jl`` for rows i, j.

    Exact, each pair of rows takes a multiplication for each weight. For a large layer D is replaced by ``u v^T``, for
    which K is the product, entry by entry, of ``G diag(u) G^T`` and ``A diag(v) A^T``: ``u_k = sum_il D_kl a_il^2``,
    and v such that each input keeps its share of the trace. Rows and columns of K are then scaled such that its
    diagonal is exact, and in the direction of its largest eigenvalue K is stretched to what the exact matrix has
    there. So it is exact for a D of rank one, stays positive, and changes continuously with all that enters.

    Adam's D has nearly rank one where it counts, as Adafactor assumes. Where it has no such structure, the trace stays
    right, and the largest eigenvalue, if it is one of many of about its size, reads lower.

    Args:
        g: ``(M, o)``.
        a: ``(M, i)``.
        weights: D, ``(o, i)``, not negative.

    Cost: two products of matrices as large as that of the layer's gradient for M rows, and three passes over D.
    Source: Shazeer & Stern 2018, section 3, for the rank.
    """
    if weights.numel() <= FEW:
        return _exact(g, a, weights.sqrt())
    # In units of the largest: fourth powers of the rows, and squares of K, would leave the range of float32.
    of_g, of_a = _largest(g), _largest(a)
    g, a = g / of_g, a / of_a
    g2, a2 = g.square(), a.square()
    u = weights @ a2.sum(0)
    traces = (g2 @ weights).mul_(a2)  # of row i at input l
    v = _ratio(traces.sum(0), (g2 @ u) @ a2)
    gram = ((g * u) @ g.T).mul_((a * v) @ a.T)
    diagonal = traces.sum(1)
    of_k = _largest(diagonal)
    scale = _ratio(diagonal / of_k, gram.diagonal()).sqrt()
    gram = _exact_at_top(gram.mul_(scale[:, None]).mul_(scale), g, a, weights, of_k)
    return gram.mul_(of_g * of_a).mul_(of_k).mul_(of_g * of_a)


def _largest(t: Tensor) -> Tensor:
    """Return the largest absolute value, and 1 where all are 0."""
    largest = t.abs().amax()
    return torch.where(largest == 0, 1.0, largest)


def _exact_at_top(gram: Tensor, g: Tensor, a: Tensor, weights: Tensor, unit: Tensor) -> Tensor:
    """Return ``T K T`` with ``T = 1 + (s - 1) c c^T``, c the sharpest direction of K, in which it is then exact.

    K, whose largest diagonal entry is 1, is that of rows and weights over ``unit``.
    """
    power, tiny = gram, torch.finfo(gram.dtype).tiny
    for _ in range(SQUARINGS):
        power = power / power.diagonal().max().clamp_min(tiny)
        power = power @ power
    c = power.sum(1)
    c = c / c.norm().clamp_min(tiny)
    moved = gram @ c
    top = c @ moved
    change = ((g * c[:, None]).T @ a).square_().reshape(-1)  # of each weight, squared
    exact = change @ weights.reshape(-1) / unit
    stretch = (_ratio(exact, top).sqrt() - 1) * c
    return gram.addr_(stretch, moved).addr_(moved, stretch).addr_(stretch, stretch * top)


def _ratio(t: Tensor, whole: Tensor) -> Tensor:
    """Return ``t / whole``, and 0 where nothing is."""
    return torch.where(whole > 0, t / whole, 0.0)


def _exact(g: Tensor, a: Tensor, root: Tensor) -> Tensor:
    """Take a few outputs at a time."""
    share = g.new_zeros(len(g), len(g))
    step = max(1, BLOCK // max(1, a.numel()))
    for some, weights in zip(g.split(step, dim=1), root.split(step)):
        rows = (some[:, :, None] * weights * a[:, None]).flatten(1)
        share.addmm_(rows, rows.T)
    return share
