"""Extreme eigenvalues and norms from products alone, each with its residual."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg.operator import LinearOperator


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue, its unit vector, and ``residual = ||A v - value v||`` (absolute).

    For symmetric A some exact eigenvalue lies within ``residual`` of ``value``, which need not be the largest; what
    bounds the largest is ``upper``, where it was asked for.
    """

    value: Tensor
    vector: Tensor
    residual: Tensor
    products: int
    converged: bool
    upper: Tensor | None = None


@dataclass(frozen=True)
class Ritz:
    """What ``k`` Lanczos steps know of a symmetric operator.

    Attributes:
        values: ``(*batch, k)``, ascending: approximate eigenvalues, all inside the true spectrum.
        residuals: ``(*batch, k)``: ``||A v - value v||`` of each, in the units of A.
        coefficients: ``(*batch, k, k)``: columns expand the Ritz vectors in ``basis``.
        basis: ``(k, *batch, n)``, orthonormal.
        converged: whether each requested end met the tolerance.
    """

    values: Tensor
    residuals: Tensor
    coefficients: Tensor
    basis: Tensor
    converged: bool

    def pair(self, index: int) -> Eigenpair:
        """The Ritz pair at ``index``: 0 is the smallest eigenvalue, -1 the largest."""
        weights = self.coefficients[..., index].to(self.basis)
        vector = torch.einsum("...k,k...n->...n", weights, self.basis)
        return Eigenpair(
            value=self.values[..., index],
            vector=vector / _norm(vector).clamp_min(torch.finfo(vector.dtype).tiny),
            residual=self.residuals[..., index],
            products=len(self.basis),
            converged=self.converged,
        )


def lanczos(
    operator: LinearOperator,
    start: Tensor,
    *,
    steps: int,
    tol: float = 1e-3,
    ends: tuple[int, ...] = (-1,),
    failure: float | None = None,
    share: float = 1.0,
    generator: torch.Generator | None = None,
) -> Ritz:
    """Extreme eigenvalues of a symmetric operator, or of a batch of them at once.

    ``A Q = Q T + beta q e^T`` with full reorthogonalisation; the eigenvalues of ``T = Q^T A Q`` are the Ritz values,
    and ``|beta s_k|`` their residuals. T is filled with the measured overlaps of each product with all earlier vectors,
    not with the ``beta`` that built them: with inexact products those would be biased up. Where an invariant subspace
    is found (``beta = 0``) the iteration goes on in a fresh random direction with coupling 0, and the ends that must
    converge are those of the newest block, so that a start vector which is itself an eigenvector cannot hide the
    rest of the spectrum.

    Args:
        operator: symmetric, ``(*batch, n) -> (*batch, n)``.
        start: ``(*batch, n)``, not zero; warm starts are welcome.
        steps: at most this many products.
        tol: stop when the residual of every end in ``ends`` is at most ``tol`` times the largest |value|.
        ends: which ends must converge: -1 the algebraically largest, 0 the smallest.
        failure: asks for more than a residual, which bounds the distance to *some* eigenvalue: the bound of
            `spectrum_bounds` beyond each end, which fails with this probability, must be within the tolerance.
        share: of the start, random; see there.
        generator: for the fresh directions; None draws from a fixed seed, never from the global state.

    Returns:
        Ritz values with residuals, in float64 whatever the dtype of the vectors.

    Cost: one product a step, and the memory of ``steps`` vectors. Source: Golub & Van Loan, Matrix Computations, 10.1;
    Parlett 1980, 13.2.
    """
    n = operator.shape[1]
    steps = min(steps, n)
    # Not a seed that a caller would use for the start: a fresh direction must differ from it.
    generator = generator or torch.Generator(start.device).manual_seed(2**31 - 1)
    eps = torch.finfo(start.dtype).eps
    basis = start.new_empty(steps, *start.shape)
    projected = torch.zeros(*start.shape[:-1], steps, steps, dtype=torch.float64)
    basis[0] = _unit(start, generator, basis[:0])
    origin = torch.zeros(start.shape[:-1], dtype=torch.long)  # where the newest block begins
    for k in range(steps):
        w = operator.apply(basis[k])
        w, overlap = _orthogonalise(w, basis[: k + 1])
        w, _ = _orthogonalise(w, basis[: k + 1])  # once is not enough: Kahan's "twice is enough"
        # The one place where a step waits for the device.
        *column, beta = torch.stack([*overlap, _norm(w)[..., 0]]).double().cpu()
        projected[..., : k + 1, k] = projected[..., k, : k + 1] = torch.stack(column, dim=-1)
        values, coefficients = _eigh(projected[..., : k + 1, : k + 1])
        residuals = (beta[..., None] * coefficients[..., -1, :]).abs()
        scale = values.abs().amax(-1)
        finite = bool(torch.isfinite(values).all())
        broken = beta <= 8 * eps * scale
        if failure is None:
            met = torch.stack([_met(values, coefficients, residuals, origin, end, tol) for end in ends]).all(0)
            # A first block that breaks off says nothing of what the start lacked; a random one has seen all the rest.
            met = torch.where(broken, origin > 0, met)
        else:
            seen = Ritz(values, residuals, coefficients, basis[: k + 1], False)
            met = torch.stack([_bounded(seen, failure, share, 1 if end else -1, tol) for end in ends]).all(0)
        small = bool(met.all())
        # A single product cannot tell an eigenvector from the top one.
        converged = finite and (k + 1 == n or (small and k > 0))
        if converged or not finite or k + 1 == steps:
            break
        if bool(broken.any()):
            origin = torch.where(broken, k + 1, origin)
            fresh = _unit(torch.zeros_like(w), generator, basis[: k + 1])
            w = torch.where(broken[..., None].to(w.device), fresh, w)
        basis[k + 1] = w / _norm(w)
    return Ritz(values, residuals, coefficients, basis[: k + 1], converged)


def operator_norm(
    operator: LinearOperator,
    start: Tensor | None = None,
    *,
    steps: int = 30,
    tol: float = 1e-3,
    failure: float | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpair:
    """``||A||_2 = sqrt(lambda_max(A^T A))`` with the right singular vector.

    Args:
        operator: any shape, with an adjoint.
        start: ``(*batch, n)``, for instance the vector of the last call; None starts at random.
        steps: at most this many pairs of products.
        tol: on the residual of ``A^T A`` relative to ``||A||^2``; the value's relative error is at most half
            of it from some singular value, and quadratically small where the largest is separated.
        failure: asks for ``upper``, which the norm exceeds with at most this probability over the random start. It is
            exact after n steps: where those are allowed they are taken, whatever ``tol``.
        generator: for the random start.

    Returns:
        The norm and its vector; ``residual`` is ``||A^T A v - s^2 v|| / (2 s)``, in the units of A. The value
        is always a lower bound.

    Raises:
        ValueError: for an upper bound from a start that is not random.

    Cost: one product with A and one with its transpose a step.
    """
    if start is not None and failure is not None:
        raise ValueError(
            "failure=...: only a random start tells how likely it is to have missed the top: give no start"
        )
    if start is None:
        generator = generator or torch.Generator(operator.device).manual_seed(0)
        start = _randn((*operator.batch, operator.shape[1]), operator.dtype, operator.device, generator)
    if failure is not None and operator.shape[1] <= steps:
        tol = 0.0
    ritz = lanczos(operator.T @ operator, start, steps=steps, tol=tol, generator=generator)
    top = ritz.pair(-1)
    value = top.value.clamp_min(0).sqrt()
    residual = torch.where(value == 0, 0.0, top.residual / (2 * value).clamp_min(torch.finfo(torch.float64).tiny))
    upper = None if failure is None else _beyond(ritz, failure, 1).clamp_min(0).sqrt()
    return Eigenpair(value, top.vector, residual, top.products, top.converged, upper)


def norm_upper(
    operator: LinearOperator,
    *,
    steps: int = 30,
    failure: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``||A||_2`` from above, except with probability ``failure``: exact where the shorter side has at most ``steps``.

    See `spectrum_bounds`. Cost: ``2 steps`` products, ``2 min(m, n)`` at most.
    """
    m, n = operator.shape
    found = operator_norm(
        operator if n <= m else operator.T, steps=steps, tol=0.0, failure=failure, generator=generator
    ).upper
    assert found is not None
    return found


def top_between(
    operator: LinearOperator,
    *,
    steps: int,
    ratio: float = 1.0,
    failure: float = 1e-3,
    generator: torch.Generator | None = None,
) -> tuple[Ritz, Tensor]:
    """The largest eigenvalue of a positive semidefinite operator, or of each of a batch, from both sides.

    Lanczos from a random start, until the upper end is at most ``ratio`` times the lower one, the largest Ritz value.

    Args:
        operator: symmetric.
        steps: at most this many products.
        ratio: of the ends.
        failure: probability with which an upper end, of each in the batch, does not hold; see `spectrum_bounds`.
        generator: of the start.

    Returns:
        What Lanczos has seen, and the upper ends, ``(*batch,)`` in float64.

    Cost: at most ``steps`` products, ``n`` where the operator is smaller; it is exact then.
    """
    generator = generator or torch.Generator(operator.device).manual_seed(0)
    start = _randn((*operator.batch, operator.shape[1]), operator.dtype, operator.device, generator)
    ritz = lanczos(operator, start, steps=steps, tol=ratio - 1, failure=failure, generator=generator)
    return ritz, _beyond(ritz, failure, 1)


def spectrum_bounds(ritz: Ritz, *, failure: float = 1e-3, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Numbers that the smallest eigenvalue is not below, and the largest not above, by what Lanczos has seen.

    Each holds with probability ``1 - failure`` over the start b, which must have been drawn uniformly from the sphere
    (normalised Gaussian numbers), independent of A. Nothing is assumed of the spectrum. A warm start w may be mixed
    with a random one, ``b = (w + s r) / ||w + s r||``, where r is a random unit vector independent of A and w: then
    ``share = s / ||w + s r||``, and the bound is the wider. The overlap of r with an eigenvector has a density that is
    symmetric and, from n = 3 on, nowhere rises away from 0: no shift by w makes it likelier to be small (Anderson
    1955).

    Lanczos' vectors are ``q_j(A) b`` with polynomials q_j of degree ``j = 0 ... k``, so that their overlaps with the
    eigenvector u of the largest eigenvalue are ``q_j(lambda) <u, b>``, and ``<u, b>^2 sum_j q_j(lambda)^2 <= 1`` by
    Bessel. With ``P(|<u, b>| < share d sqrt(pi / 2n)) <= d`` the largest eigenvalue is, except with probability d, at
    most the point above all Ritz values where ``sum_j q_j^2 = 2 n / (pi d^2 share^2)``. It is the same event for every
    k: one may stop when one likes. Once a block is invariant (beta = 0, or k = n) the bound is the largest Ritz value.

    Products that are not exact: rounding, and what breaks the three-term recurrence, is added. The bound is one of what
    they are products of.

    Args:
        ritz: of `lanczos`.
        failure: d.
        share: norm of the random part of the start, a unit vector; 1 is all of it.

    Returns:
        ``(*batch,)`` each, float64.

    Cost: none beside the run. Source: van Dorsselaer, Hochstenbach & van der Vorst 2000, with the sum for their last
    term; the bound of Kuczynski & Wozniakowski 1992, Thm 4.2, is what it gives for the worst spectrum.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix, lanczos, spectrum_bounds
        >>> A = from_matrix(torch.diag(torch.linspace(0, 1, 500, dtype=torch.float64)))
        >>> start = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> low, high = spectrum_bounds(lanczos(A, start, steps=30))
        >>> bool(-0.05 < low < 0 and 1 < high < 1.05)
        True
    """
    return -_beyond(ritz, failure, -1, share), _beyond(ritz, failure, 1, share)


def _beyond(ritz: Ritz, failure: float, sign: int, share: float = 1.0) -> Tensor:
    """What no eigenvalue of ``sign A`` exceeds, see `spectrum_bounds`."""
    middle, couplings, defect = _recurrence(ritz, sign)
    enough = _enough(ritz.basis.shape[-1], failure, share)
    return _reach(middle, couplings, sign * ritz.values[..., -1 if sign > 0 else 0], enough) + defect


def _bounded(ritz: Ritz, failure: float, share: float, sign: int, tol: float) -> Tensor:
    """Whether `_beyond` is within ``tol``, relative to the largest |value|; at the price of one point of it."""
    middle, couplings, defect = _recurrence(ritz, sign)
    away = tol * ritz.values.abs().amax(-1) - defect
    reached = _log_growth(middle, couplings, sign * ritz.values[..., -1 if sign > 0 else 0] + away)
    return (away >= 0) & (reached >= _enough(ritz.basis.shape[-1], failure, share))


def _enough(n: int, failure: float, share: float) -> float:
    if not 0 < failure < 1:
        raise ValueError(f"failure={failure!r}: give a probability between 0 and 1")
    return math.log(2 * n / math.pi) - 2 * math.log(failure * share)


def _recurrence(ritz: Ritz, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal and couplings of the three-term recurrence of ``sign A``, and what it leaves out of the products."""
    k, n = len(ritz.basis), ritz.basis.shape[-1]
    values = sign * ritz.values
    projected = (ritz.coefficients * values[..., None, :]) @ ritz.coefficients.mT
    middle = projected.diagonal(dim1=-2, dim2=-1)
    couplings = projected.diagonal(1, -2, -1).abs()
    last = (
        torch.linalg.vector_norm(ritz.residuals, dim=-1, keepdim=True) if k < n else torch.zeros_like(middle[..., :1])
    )
    couplings = torch.cat([couplings, last], dim=-1)
    rounding = 16 * torch.finfo(ritz.basis.dtype).eps * values.abs().amax(-1)
    defect = projected.tril(-2).square().sum((-2, -1)).mul(2).sqrt() + rounding
    return middle, couplings, defect


#: Points of a grid that brackets the bound, and how often it is refined.
_POINTS, _ROUNDS = 64, 6


def _reach(middle: Tensor, couplings: Tensor, top: Tensor, enough: float) -> Tensor:
    """The point above ``top`` where ``log sum_j q_j^2`` reaches ``enough``; from above."""
    size = torch.maximum(middle.abs().amax(-1), couplings.amax(-1))
    below, above = torch.zeros_like(top), 4 * size.clamp_min(torch.finfo(torch.float64).tiny)
    # Beyond 4 scales every degree multiplies q by more than 2.
    while bool((short := _log_growth(middle, couplings, top + above) < enough).any()):
        above = torch.where(short, 2 * above, above)
    share = torch.linspace(0, 1, _POINTS + 1, dtype=top.dtype, device=top.device)[1:]
    for _ in range(_ROUNDS):
        points = below[..., None] + (above - below)[..., None] * share
        reached = _log_growth(middle[..., None, :], couplings[..., None, :], top[..., None] + points) >= enough
        first = reached.int().argmax(-1, keepdim=True)  # the last point reaches it always
        above = points.gather(-1, first)[..., 0]
        below = torch.where(first > 0, points.gather(-1, (first - 1).clamp_min(0)), below[..., None])[..., 0]
    return torch.where(size > 0, top + above, top)  # NaN stays, and nothing is no more than nothing


def _log_growth(middle: Tensor, couplings: Tensor, at: Tensor) -> Tensor:
    """``log sum_j q_j(at)^2`` above all Ritz values, where all q_j are positive, by their ratios."""
    logs, ratio, before = [torch.zeros_like(at)], torch.full_like(at, torch.inf), torch.zeros_like(at)
    for j in range(middle.shape[-1]):
        ratio = (at - middle[..., j] - before / ratio).clamp_min(0) / couplings[..., j]
        before = couplings[..., j]
        logs.append(logs[-1] + 2 * ratio.log())
    return torch.logsumexp(torch.stack(logs).nan_to_num(torch.inf, torch.inf, -torch.inf), dim=0)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(matrix).all()):  # LAPACK would raise: an honest NaN instead
        return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _met(values: Tensor, coefficients: Tensor, residuals: Tensor, origin: Tensor, end: int, tol: float) -> Tensor:
    """Whether an end of the block that begins at ``origin`` has converged; the blocks before it are exact."""
    rows = torch.arange(values.shape[-1])
    share = (coefficients.square() * (rows >= origin[..., None])[..., None]).sum(-2)
    newest = torch.where(share > 0.5, values, torch.nan)
    index = newest.nan_to_num(-torch.inf).argmax(-1) if end else newest.nan_to_num(torch.inf).argmin(-1)
    residual = residuals.gather(-1, index[..., None])[..., 0]
    return residual <= tol * newest.abs().nan_to_num(0.0).amax(-1)


def _unit(vector: Tensor, generator: torch.Generator, basis: Tensor) -> Tensor:
    """``vector`` normalised; where it vanishes, a random direction orthogonal to ``basis``."""
    norm = _norm(vector)
    if bool((norm == 0).any()):
        random = _randn(vector.shape, vector.dtype, vector.device, generator)
        for _ in range(2):
            random, _ = _orthogonalise(random, basis)
        vector = torch.where(norm == 0, random, vector)
        norm = _norm(vector)
    return vector / norm


def _randn(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Tensor:
    """Wherever the generator lives."""
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).to(device)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.einsum("k...n,...n->k...", basis, w)
    return w - torch.einsum("k...,k...n->...n", overlap, basis), overlap


def _norm(a: Tensor) -> Tensor:
    """Of each row; scaled, as squares leave the range of float32 where the entries are below 1e-19 or above 1e19."""
    if not a.shape[-1]:
        return torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    scale = a.abs().amax(-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return scale * torch.linalg.vector_norm(a / scale, dim=-1, keepdim=True)
