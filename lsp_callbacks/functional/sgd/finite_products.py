"""Exponents of finitely many steps of SGD frozen at one point, and the sum of all of them."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.modes import PLAIN, Modes, UpdateRule
from lsp_callbacks.functional.sgd.sgd_stability import Draw, Exponent, Sampling, growths


def finite_time_exponents(
    modes: Modes,
    lr: float | Tensor,
    *,
    horizon: int,
    batch_size: int,
    samples: int = 64,
    rule: UpdateRule = PLAIN,
    sampling: Sampling = "iid",
    replacement: bool = False,
    population: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``(1/n) log ||A_n ... A_1 v||`` of several runs from random unit v; see `sgd_exponent`.

    Args:
        horizon: ``n``, steps.

    Returns:
        ``(samples, *lr.shape)``, nats per step. Their spread is what one training run of ``n`` steps can see.
    """
    lrs = torch.as_tensor(lr, dtype=torch.float64)
    if not modes.rank:
        return torch.full((samples, *lrs.shape), math.nan, dtype=torch.float64)
    draw = Draw(modes, batch_size, sampling, replacement, population, generator)
    start = torch.randn(samples, modes.rank, generator=draw.generator, dtype=torch.float64)
    step = rule.scaled_coefficients(lrs.reshape(-1, 1).to(modes.factor))
    logs = growths(modes, step, start, start.new_ones(1, modes.rank), rule.weight_decay, draw, horizon)
    return logs.mean(0)[..., 0].reshape(samples, *lrs.shape)


def sum_of_exponents(
    modes: Modes,
    lr: float,
    *,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    replacement: bool = False,
    generator: torch.Generator | None = None,
    exact: int = 4096,
    draws: int = 2048,
) -> Exponent:
    """Return ``E log |det(I - (lr/B) K_BB)|``, the sum of all exponents of plain SGD; lambda is at least its mean.

    Args:
        modes: of all samples.
        lr: one rate.
        batch_size: samples of a batch.
        rule: the plain one.
        replacement: within a batch.
        generator: for the draws; None draws from a fixed seed.
        exact: enumerate every batch up to this many.
        draws: of batches, when there are more.

    Raises:
        ValueError: for another rule, a batch larger than the samples, or samples that batch statistics tie together.
    """
    if rule != PLAIN:
        raise ValueError("the determinant of a step is known in this form for plain SGD only: pass UpdateRule()")
    if modes.together > 1:
        raise ValueError("batch statistics tie the samples of a batch together: batches cannot be enumerated")
    n, draw = modes.samples, Draw(modes, batch_size, "iid", replacement, None, generator)
    count = n**batch_size if replacement else math.comb(n, batch_size)
    if count <= exact:
        batches = (
            itertools.product(range(n), repeat=batch_size)
            if replacement
            else itertools.combinations(range(n), batch_size)
        )
        index = torch.tensor(list(batches))
    else:
        index = draw.indices(1, draws)[0]
    rows = modes.factor[index].flatten(1, 2)
    step = torch.eye(rows.shape[1], dtype=rows.dtype) - lr / batch_size * rows @ rows.mT
    logs = torch.linalg.slogdet(step).logabsdet
    return Exponent(logs.mean(), logs.std() / len(logs) ** 0.5 if count > exact else torch.zeros_like(logs[0]))
