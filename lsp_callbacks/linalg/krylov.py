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

    For symmetric A some exact eigenvalue lies within ``residual`` of ``value``.
    """

    value: Tensor
    vector: Tensor
    residual: Tensor
    products: int
    converged: bool


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
        w = operator @ basis[k]
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
        met = torch.stack([_met(values, coefficients, residuals, origin, end, tol) for end in ends]).all(0)
        # A first block that breaks off says nothing of what the start lacked; a random one has seen all the rest.
        small = bool(torch.where(broken, origin > 0, met).all())
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
    generator: torch.Generator | None = None,
) -> Eigenpair:
    """``||A||_2 = sqrt(lambda_max(A^T A))`` with the right singular vector.

    Args:
        operator: any shape, with an adjoint.
        start: ``(*batch, n)``, for instance the vector of the last call; None starts at random.
        steps: at most this many pairs of products.
        tol: on the residual of ``A^T A`` relative to ``||A||^2``; the value's relative error is at most half
            of it from some singular value, and quadratically small where the largest is separated.
        generator: for the random start.

    Returns:
        The norm and its vector; ``residual`` is ``||A^T A v - s^2 v|| / (2 s)``, in the units of A. The value
        is always a lower bound.

    Cost: one product with A and one with its transpose a step.
    """
    if start is None:
        generator = generator or torch.Generator(operator.device).manual_seed(0)
        start = torch.randn(
            *operator.batch, operator.shape[1], dtype=operator.dtype, device=operator.device, generator=generator
        )
    top = lanczos(operator.T @ operator, start, steps=steps, tol=tol, generator=generator).pair(-1)
    value = top.value.clamp_min(0).sqrt()
    residual = top.residual / (2 * value).clamp_min(torch.finfo(torch.float64).tiny)
    return Eigenpair(value, top.vector, torch.where(value == 0, 0.0, residual), top.products, top.converged)


def confidence(steps: int, n: int, failure: float) -> float:
    """What a norm from Lanczos on ``A^T A`` is to be multiplied with to be a bound from above.

    ``P(theta < (1 - e) lambda) <= 1.648 sqrt(n) exp(-sqrt(e) (2 k - 1))`` after k steps from a random start, whatever
    the spectrum; a symmetric positive semidefinite operator of size n.

    Args:
        steps: k, from a start that is uniform on the sphere, without stopping early.
        n: size of the operator.
        failure: probability with which the norm may exceed the bound.

    Raises:
        ValueError: where so few steps bound nothing.

    Source: Kuczynski & Wozniakowski 1992, Thm 4.2.
    """
    defect = (math.log(1.648 * math.sqrt(n) / failure) / (2 * steps - 1)) ** 2
    if defect >= 1:
        raise ValueError(f"steps={steps} are too few for failure={failure}: take more")
    return 1 / math.sqrt(1 - defect)


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
        random = torch.randn(vector.shape, dtype=vector.dtype, device=vector.device, generator=generator)
        for _ in range(2):
            random, _ = _orthogonalise(random, basis)
        vector = torch.where(norm == 0, random, vector)
        norm = _norm(vector)
    return vector / norm


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.einsum("k...n,...n->k...", basis, w)
    return w - torch.einsum("k...,k...n->...n", overlap, basis), overlap


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)
