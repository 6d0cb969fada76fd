"""How the eigenvalues of a large symmetric operator are distributed: bulk, outliers, and what lies below zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.functional.curvature.marchenko_pastur import MarchenkoPastur, fit_marchenko_pastur
from lsp_callbacks.linalg import LinearOperator, Quadrature, quadratures

#: What is below this share of the largest eigenvalue in size counts as 0: differences of gradients are not better.
ZERO = 1e-3
#: An eigenvalue is resolved where its residual is this share of the gap around it, and its weight that of a single
#: eigenvalue: ``n weight`` is then chi^2 of one degree, above 10 once in 600.
RESOLVED, SINGLE = 0.1, 10.0
#: Outliers lie beyond a gap of this share of the bulk's width, and are at most this share of all eigenvalues.
APART, FEW = 0.1, 0.1


@dataclass(frozen=True)
class Spectrum:
    """The distribution of the eigenvalues of a symmetric ``(n, n)`` operator A, estimated by Lanczos runs.

    Errors are standard errors over the random starts.

    Attributes:
        nodes: ``(k,)``, of all runs, ascending.
        weights: ``(k,)``, of sum 1: ``sum_j weights_j f(nodes_j)`` estimates ``tr f(A) / n``.
        size: n.
        trace: ``tr A``, unbiased.
        trace_error: 0 where all eigenvalues were found.
        square: ``tr A^2``, unbiased.
        square_error: likewise.
        effective_rank: ``(tr A)^2 / tr A^2``: how many equal eigenvalues would have both; NaN for A = 0.
        effective_rank_error: to first order.
        negative: a lower bound of the share of eigenvalues below 0, within its standard error.
        negative_error: of that.
        zero: the share that the runs cannot distinguish from 0, an upper bound of the share that is 0;
            ``negative + zero`` is an upper bound of the share below 0.
        least: the smallest Ritz value, an upper bound of the smallest eigenvalue.
        least_residual: some eigenvalue lies within it of ``least``.
        outliers: single eigenvalues, ascending, that the run with most of them has resolved beyond a gap on either side
            of the bulk; None where they are more than a tenth of all, or everything is resolved: there is no bulk then.
        outlier_residuals: of these.
        bulk: the first and the last Ritz value between them. The upper one is a lower bound of the largest
            eigenvalue below the upper outliers, and likewise the lower one.
        fit: of the law of Marchenko and Pastur to what lies between the outliers; None where there is no bulk, or
            its mean is not positive. Ask whether it is ``alike``.
        products: spent.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    trace: float
    trace_error: float
    square: float
    square_error: float
    effective_rank: float
    effective_rank_error: float
    negative: float
    negative_error: float
    zero: float
    least: float
    least_residual: float
    outliers: Tensor | None
    outlier_residuals: Tensor | None
    bulk: tuple[float, float] | None
    fit: MarchenkoPastur | None
    products: int


def spectral_density(
    operator: LinearOperator, *, probes: int = 2, steps: int = 40, generator: torch.Generator | None = None
) -> Spectrum:
    """Return the distribution of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    What a run has resolved is taken out of the estimates of the run before it, whose start does not depend on it:
    ``tr f(A) = sum_j f(theta_j) + E[(n - k) (v^T f(A) v - sum_j (v^T u_j)^2 f(theta_j)) / (1 - sum_j (v^T u_j)^2)]``.
    So the error of the trace is that of the bulk, with the standard deviation ``sqrt(2 (n - k)^2 Var f / ((n - k + 2)
    probes))`` for Gaussian starts, and repeated eigenvalues do no harm.

    Args:
        operator: symmetric.
        probes: how many starts; at least 2, unless ``steps`` is n or more.
        steps: Lanczos steps of each.
        generator: of the starts; None draws from a fixed seed.

    Raises:
        ValueError: for fewer than 2 probes.

    Cost: ``probes * steps`` products, and the memory of ``steps`` vectors. Source: Ubaru, Chen & Saad 2017; Ghorbani,
    Krishnan & Xiao 2019; Meyer, Musco, Musco & Woodruff 2021 for taking out what is known.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import spectral_density
        >>> from lsp_callbacks.linalg import from_matrix
        >>> result = spectral_density(from_matrix(torch.diag(torch.tensor([-1.0, 0.0, 0.0, 3.0]))))
        >>> round(result.trace, 4), round(result.effective_rank, 4), result.negative, result.zero
        (2.0, 0.4, 0.25, 0.5)
    """
    if probes < 2:
        raise ValueError(f"probes={probes}: one run cannot be checked by another, give at least 2")
    n = operator.shape[1]
    generator = generator or torch.Generator().manual_seed(0)
    starts = torch.randn(probes, n, dtype=operator.dtype, generator=generator).to(operator.device)
    runs = quadratures(operator, starts, steps=steps)
    nodes, order = torch.cat([run.nodes for run in runs]).sort()
    weights = torch.cat([run.weights for run in runs])[order] / len(runs)
    scale = float(nodes.abs().max())

    singles = [_resolved(run, n, scale) for run in runs]
    trace, trace_error = _total(runs, singles, n, lambda x: x)
    square, square_error = _total(runs, singles, n, torch.square)
    rank, rank_error = math.nan, math.nan
    if trace and square > 0:
        rank = trace**2 / square
        rank_error = rank * _total(runs, singles, n, lambda x: 2 * x / trace - x.square() / square)[1]
    below, zero, _ = torch.stack([run.masses(width=ZERO * scale) for run in runs]).mean(0).tolist()
    share = max(below, 1 / n)  # a single eigenvalue may well have been missed
    least = min(runs, key=lambda run: float(run.nodes[0]))

    bulks = [_bulk(run.nodes, resolved) for run, resolved in zip(runs, singles)]
    run, inside = min(zip(runs, bulks), key=lambda pair: int(pair[1].sum()) - len(pair[1]))
    has_bulk = bool(inside.any()) and int((~inside).sum()) <= FEW * n
    bulk = (float(run.nodes[inside][0]), float(run.nodes[inside][-1])) if has_bulk else None
    return Spectrum(
        nodes=nodes,
        weights=weights,
        size=n,
        trace=trace,
        trace_error=trace_error,
        square=square,
        square_error=square_error,
        effective_rank=rank,
        effective_rank_error=rank_error,
        negative=below,
        negative_error=0.0 if len(runs) == 1 else math.sqrt(2 * share * (1 - share) / ((n + 2) * len(runs))),
        zero=zero,
        least=float(least.nodes[0]),
        least_residual=float(least.residuals[0]),
        outliers=run.nodes[~inside] if has_bulk else None,
        outlier_residuals=run.residuals[~inside] if has_bulk else None,
        bulk=bulk,
        fit=None if bulk is None or bulk[1] - bulk[0] <= ZERO * scale else _fit(nodes, weights, run.nodes, inside),
        products=sum(len(run.nodes) for run in runs),
    )


def _resolved(run: Quadrature, n: int, scale: float) -> Tensor:
    """Return which nodes are single eigenvalues that stand apart."""
    gaps = torch.nn.functional.pad(run.nodes.diff(), (1, 1), value=torch.inf)
    gap = torch.minimum(gaps[:-1], gaps[1:])
    return (run.residuals <= RESOLVED * gap) & (gap > ZERO * scale) & (n * run.weights <= SINGLE)


def _bulk(nodes: Tensor, resolved: Tensor) -> Tensor:
    """Return which nodes belong to the bulk: all between unresolved ones, and outwards up to a wide gap."""
    inside = ~resolved
    if bool(inside.any()):
        first, last = (int(index) for index in inside.nonzero()[[0, -1], 0])
        while last + 1 < len(nodes) and nodes[last + 1] - nodes[last] < APART * (nodes[last] - nodes[first]):
            last += 1
        while first > 0 and nodes[first] - nodes[first - 1] < APART * (nodes[last] - nodes[first]):
            first -= 1
        inside[first : last + 1] = True
    return inside


def _total(runs: list[Quadrature], singles: list[Tensor], n: int, f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return ``tr f(A)`` and its standard error, see `spectral_density`."""
    if len(runs) == 1:
        return n * float(runs[0].weights @ f(runs[0].nodes)), 0.0
    totals, variances = [], []
    for run, other, resolved in zip(runs, runs[1:] + runs[:1], singles[1:] + singles[:1]):
        values, taken = f(other.nodes[resolved]), other.cross[resolved]
        rest = n - len(values)
        mean, square = ((run.weights @ f(run.nodes) ** p - taken @ values**p) / (1 - taken.sum()) for p in (1, 2))
        totals.append(values.sum() + rest * mean)
        variances.append(2 * rest**2 * (square - mean**2).clamp_min(0) / (rest + 2))
    return float(torch.stack(totals).mean()), math.sqrt(float(torch.stack(variances).mean()) / len(runs))


def _fit(nodes: Tensor, weights: Tensor, of_run: Tensor, inside: Tensor) -> MarchenkoPastur | None:
    """Fit the law to all nodes up to half way to the next outlier, smoothed by the mean distance in one run."""
    middles = (of_run[1:] + of_run[:-1]) / 2
    first, last = (int(index) for index in inside.nonzero()[[0, -1], 0])
    above = nodes > middles[first - 1] if first else torch.ones_like(nodes, dtype=torch.bool)
    below = nodes < middles[last] if last < len(middles) else torch.ones_like(nodes, dtype=torch.bool)
    width = float(of_run[last] - of_run[first]) / int(inside.sum())
    return fit_marchenko_pastur(nodes[above & below], weights[above & below], width=width)
