"""Positions (tokens) of a sample as samples of their own, of which a batch holds nearly independent ones."""

from __future__ import annotations

import torch
from torch import Tensor


def design_effect(
    gram: Tensor,
    looked: int,
    positions: int,
    *,
    samples: int,
    chance: Tensor | None = None,
    counted: Tensor | None = None,
) -> float:
    """Return by how much alike the positions of a sample are: a sample of T counts as T over this independent ones.

    The noise of a batch is, for a sample with rows ``z_t`` at T positions, ``E sum_ts z_t z_t^T X z_s z_s^T``: T terms
    with ``t = s``, and T (T - 1) others, which would be those of two samples were positions independent. With the
    means A of ``<z_t, z_t>^2``, W of ``<z_t, z_s>^2`` inside of a sample and X of that between samples it is, beyond
    the mean, ``T (A - X) + T (T - 1) (W - X)``, and so ``1 + (T - 1) (W - X) / (A - X)`` times that of T independent
    positions: the design effect of a sample of clusters.

    Args:
        gram: of rows at ``looked`` positions of each sample, ``(n looked, n looked)``, sample by sample.
        looked: at least 2.
        positions: T.
        samples: N, of which n have rows.
        chance: by which probability each of these was taken; their rows are divided by its root.
        counted: at how many positions of each sample there are rows other than zero, ``(n,)``, of which those looked at
            are taken before all others: ignored labels and padding have none. None is all.

    Returns:
        From 1, independent, to T, all the same.

    Source: Kish 1965, chapter 5, for the design effect.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import design_effect
        >>> z = torch.eye(3).repeat_interleave(2, dim=0)  # three samples, both positions of each alike
        >>> design_effect(z @ z.T, 2, 2, samples=3)
        2.0
    """
    squares = gram.square().view(len(gram) // looked, looked, -1, looked)
    inside = squares.diagonal(dim1=0, dim2=2)  # (looked, looked, n)
    total = float(squares.sum() - inside.sum())
    if chance is not None:
        inside = inside * chance.to(inside)
    if counted is not None:  # the rows stand for t / k positions: single ones and pairs are as many as they are
        t, seen = counted.clamp_min(1).to(inside), counted.clamp(1, looked).to(inside)
        pairs = seen * (t - 1) * positions * (looked - 1) / (t * (seen - 1).clamp_min(1) * (positions - 1) * looked)
        single = torch.eye(looked, dtype=torch.bool)[..., None]
        inside = inside * torch.where(single, seen * positions / (t * looked), pairs)
    alone = float(inside.diagonal().sum())
    a, w = alone / (samples * looked), float(inside.sum() - alone) / (samples * looked * (looked - 1))
    x = total / (max(samples * (samples - 1), 1) * looked**2)
    if not a > x:
        return 1.0 if not a > 0 else float(positions)
    return min(max(1 + (positions - 1) * (w - x) / (a - x), 1.0), float(positions))
