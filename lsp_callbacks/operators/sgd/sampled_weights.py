"""Gram matrix of outer products behind a preconditioner, exact for few weights and from a sample of many."""

from __future__ import annotations

import torch
from torch import Tensor

#: Weights of a layer that are looked at behind a preconditioner; one of twice as many is taken as a whole.
SAMPLED = 2**13
#: How many numbers at a time stay in the processor's cache.
BLOCK = 2**19


def weighted_gram(g: Tensor, a: Tensor, root: Tensor) -> Tensor:
    """Return ``K_ij = sum_kl root_kl^2 g_ik g_jk a_il a_jl`` for rows i, j.

    Exact, each pair of rows takes a multiplication for each weight. So of a large layer m weights are taken, each with
    a probability in proportion to what it adds to the trace, ``t_kl = root_kl^2 sum_i g_ik^2 a_il^2``, and divided by
    it: K is then a mean over m matrices ``T y y^T`` with ``|y| = 1`` (T the trace, which is exact). Its eigenvalue
    ``lambda`` has a relative standard deviation of at most ``sqrt(T / (lambda m))``, and K stays positive.

    The weights are taken at equal distances in the cumulative sum of t, which only lowers that, and is the same in each
    run.

    Args:
        g: ``(M, o)``.
        a: ``(M, i)``.
        root: ``(o, i)``.

    Cost: one product of matrices as large as that of the layer's gradient, and m multiplications for each pair.
    """
    rows, most = len(g), SAMPLED
    if root.numel() <= 2 * most:
        return _exact(g, a, root)
    trace = (g.square().T @ a.square()).mul_(root.square()).reshape(-1)
    total = trace.double().cumsum(0)
    if not float(total[-1]) > 0:
        return g.new_zeros(rows, rows)
    at = (torch.arange(most, dtype=total.dtype, device=total.device) + 0.5) * (total[-1] / most)
    taken = torch.searchsorted(total, at).clamp_(max=root.numel() - 1)
    factor = root.reshape(-1)[taken] * ((total[-1] / most).to(trace) / trace[taken]).sqrt()
    picked = g.T.contiguous()[taken // root.shape[1]]
    picked = picked.mul_(a.T.contiguous()[taken % root.shape[1]]).mul_(factor[:, None])
    return picked.T @ picked


def _exact(g: Tensor, a: Tensor, root: Tensor) -> Tensor:
    """Take a few outputs at a time."""
    share = g.new_zeros(len(g), len(g))
    step = max(1, BLOCK // max(1, a.numel()))
    for some, weights in zip(g.split(step, dim=1), root.split(step)):
        rows = (some[:, :, None] * weights * a[:, None]).flatten(1)
        share.addmm_(rows, rows.T)
    return share
