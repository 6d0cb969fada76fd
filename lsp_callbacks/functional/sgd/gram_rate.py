"""The critical rate of the second moment straight from a Gram matrix, in single precision and without modes."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lsp_callbacks.functional.sgd.low_rank_noise import Array, eigenpairs, top_by_noise
from lsp_callbacks.functional.sgd.mean_square import affine_in_rate, mean_square_lr, stationary_factor
from lsp_callbacks.functional.sgd.modes import PLAIN, UpdateRule, drawn_from, in_unit, noise_share, reduced_modes

#: Eigenvalues below this share of the largest are rounding errors. What N rows lose with them is N times that at most.
ROUNDING = 1e-6
#: Decoupled decay of at most this share of the tolerance, in one step, is bounded instead of followed.
SLIGHT = 0.02
#: Rounds that follow a rule in whose equations the rate is not affine, and the step of their difference quotients.
ROUNDS, STEP = 8, 1e-2


def gram_mean_square_lr(
    gram: Tensor,
    *,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    samples: int | None = None,
    chance: Tensor | None = None,
    replacement: bool = False,
    population: int | None = None,
    tol: float = 5e-3,
) -> float:
    """Return `mean_square_lr` of samples with one row each, at most ``tol`` too low, from their Gram matrix.

    The same equations in float32, whose matrices of some dozen rows cost calls and not arithmetic. Where the rate
    enters them otherwise than by an affine function (Nesterov's momentum, decoupled decay), they are linear between two
    neighbouring rates, and followed from there. Where float32 or the iteration does not suffice: `reduced_modes` and
    `mean_square_lr`.

    Args:
        gram: ``K = Z Z^T``, ``(N, N)``, on the CPU.
        batch_size: samples of a batch.
        rule: of the optimizer.
        samples: how many there are, where K is that of some of them, taken by chance.
        chance: by which probabilities; the rows are then divided by their roots.
        replacement: within a batch.
        population: as in `sgd_exponent`; here exact for any ``population``.
        tol: relative, above 1e-3. What the iteration, a slight decay and rounding may lack is taken from the rate.

    Returns:
        The rate; inf where the rows are zero or nothing pushes (``dampening = 1``); NaN for a matrix that is not
        finite.

    Raises:
        ValueError: if a batch is larger than what it is drawn from.

    Cost: one ``eigh`` in float32 and some five steps of ``4 N^3``: from 64 rows 0.5 ms. Source: as `mean_square_lr`.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import gram_mean_square_lr
        >>> z = torch.tensor([[1.0], [3.0**0.5]])  # samples of curvature 1 and 3: the edge is at 0.8
        >>> round(gram_mean_square_lr(z @ z.T, batch_size=1), 3)
        0.8
    """
    total = samples or len(gram)
    drawn = drawn_from(total, batch_size, population)
    products = gram.numpy()
    if not math.isfinite(products.sum()):
        return math.nan
    largest = float(products.diagonal().max())
    if (rule.momentum and rule.dampening == 1 and not rule.direct) or not largest > 0:
        return math.inf
    unit = math.ldexp(1.0, math.frexp(largest / total)[1])  # in which curvatures are near 1
    scaled, share = in_unit(rule, unit), noise_share(drawn, batch_size, replacement)
    rate = _single(products / unit, total, share, chance, scaled, tol) if share > 0 else None
    if rate is not None:
        return rate / unit
    modes = reduced_modes(gram, tol=ROUNDING, samples=samples, chance=chance)
    return mean_square_lr(
        modes, batch_size=batch_size, rule=rule, replacement=replacement, population=population, tol=tol
    )


def _single(gram: Array, total: int, share: float, chance: Tensor | None, rule: UpdateRule, tol: float) -> float | None:
    """Return the rate in float32; None where that does not suffice."""
    if not max(rule.weight_decay, rule.decoupled_decay) < 1 / ROUNDING:
        return None
    eigenvalues, eigenvectors = eigenpairs(gram.astype(np.float32))
    first = int(eigenvalues.searchsorted(ROUNDING * eigenvalues[-1], side="right"))
    values, vectors = eigenvalues[first:], eigenvectors[:, first:]
    rows, h = vectors * (np.sqrt(values) * (share / total) ** 0.25), values / total  # the noise holds fourth powers
    if chance is not None:
        rows *= np.sqrt(np.sqrt(chance.numpy().astype(rows.dtype)))[:, None]
    rows = np.ascontiguousarray(rows)
    decayed = h + rule.weight_decay if rule.weight_decay else h
    source, fixed = affine_in_rate(decayed, rule)
    diagonal = np.outer(decayed, decayed) - share * np.outer(h, h)
    pair = top_by_noise(rows, source, diagonal if fixed is None else diagonal - fixed, tol)
    if pair is None:
        return None
    x, decay = pair[0] / rule.correction, rule.decoupled_decay
    if rule.nesterov or rule.direct or decay > SLIGHT * tol * x:
        x, decay = _followed(rows, decayed.astype(float), diagonal, rule, x, pair[1], tol), 0.0
    return (1 - len(gram) * ROUNDING - decay / x) / x if x > 0 else None


def _followed(rows: Array, h: Array, diagonal: Array, rule: UpdateRule, x: float, solution: Array, tol: float) -> float:
    """Return ``1 / lr`` for a rule whose `stationary_factor` is not affine in it, by lines through two rates; NaN."""
    for _ in range(ROUNDS):
        start = ((rows @ solution) * rows).sum(1)
        here, beyond = (stationary_factor(h, 1 / at, rule) for at in (x, (1 + STEP) * x))
        slope = (beyond - here) / (STEP * x)
        fixed = diagonal + (x * slope - here).astype(rows.dtype)
        pair = top_by_noise(rows, slope.astype(rows.dtype), fixed, tol, start=start)
        if pair is None:
            return math.nan
        moved, (x, solution) = abs(pair[0] - x), pair
        if moved <= 0.1 * tol**0.5 * x:
            return x
    return math.nan
