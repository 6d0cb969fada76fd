"""Extreme eigenvalues and norms from products alone, each with its residual."""

from __future__ import annotations

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
        basis: ``k`` orthonormal vectors ``(*batch, n)``.
        converged: whether each requested end met the tolerance.
    """

    values: Tensor
    residuals: Tensor
    coefficients: Tensor
    basis: list[Tensor]
    converged: bool

    def pair(self, index: int) -> Eigenpair:
        """The Ritz pair at ``index``: 0 is the smallest eigenvalue, -1 the largest."""
        weights = self.coefficients[..., index].to(self.basis[0].dtype)
        vector = sum(weights[..., j, None] * q for j, q in enumerate(self.basis))
        assert isinstance(vector, Tensor)
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

    ``A Q = Q T + beta q e^T`` with full reorthogonalisation; the eigenvalues of the tridiagonal T are the
    Ritz values, and ``|beta s_k|`` are their exact residuals. Where an invariant subspace is found
    (``beta = 0``) the iteration goes on in a fresh random direction with coupling 0, so that a start vector
    which is itself an eigenvector cannot hide the rest of the spectrum.

    Args:
        operator: symmetric, ``(*batch, n) -> (*batch, n)``.
        start: ``(*batch, n)``, not zero; warm starts are welcome.
        steps: at most this many products.
        tol: stop when the residual of every end in ``ends`` is at most ``tol`` times the largest |value|.
        ends: which ends must converge: -1 the algebraically largest, 0 the smallest.
        generator: for the fresh directions; None draws from a fixed seed, never from the global state.

    Returns:
        Ritz values with residuals, in float64 whatever the dtype of the vectors.

    Cost: one product a step. Source: Golub & Van Loan, Matrix Computations, 10.1; Parlett 1980, 13.2.
    """
    n = operator.shape[1]
    generator = generator or torch.Generator(start.device).manual_seed(0)
    tiny = torch.finfo(start.dtype).eps
    basis = [_unit(start, generator, [])]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    while True:
        w = operator @ basis[-1]
        alphas.append(_dot(basis[-1], w))
        for _ in range(2):  # once is not enough: Kahan's "twice is enough"
            for q in basis:
                w = w - _dot(q, w)[..., None].to(w.dtype) * q
        betas.append(_norm(w)[..., 0].double())
        values, coefficients = _eigh(alphas, betas)
        residuals = (betas[-1][..., None] * coefficients[..., -1, :]).abs()
        scale = values.abs().amax(-1)
        finite = bool(torch.isfinite(values).all())
        small = all(bool((residuals[..., e] <= tol * scale).all()) for e in ends)
        exhausted = len(basis) == n
        # A single product cannot tell an eigenvector from the top one.
        converged = finite and (exhausted or (small and len(basis) > 1))
        if converged or not finite or len(basis) >= steps:
            return Ritz(values, residuals, coefficients, basis, converged)
        broken = betas[-1] <= 8 * tiny * scale
        fresh = _unit(torch.zeros_like(w), generator, basis) if bool(broken.any()) else w
        betas[-1] = torch.where(broken, 0.0, betas[-1])
        w = torch.where(broken[..., None], fresh, w)
        basis.append(w / _norm(w))


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
    return Eigenpair(value, top.vector, torch.where(value > 0, residual, 0.0), top.products, top.converged)


def _eigh(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    diagonal = torch.stack(alphas, dim=-1)
    tridiagonal = torch.diag_embed(diagonal)
    if len(alphas) > 1:
        off = torch.stack(betas[:-1], dim=-1)
        tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    if not bool(torch.isfinite(tridiagonal).all()):  # LAPACK would raise: an honest NaN instead
        return torch.full_like(diagonal, torch.nan), torch.full_like(tridiagonal, torch.nan)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors


def _unit(vector: Tensor, generator: torch.Generator, basis: list[Tensor]) -> Tensor:
    """``vector`` normalised; where it vanishes, a random direction orthogonal to ``basis``."""
    norm = _norm(vector)
    random = torch.randn(vector.shape, dtype=vector.dtype, device=vector.device, generator=generator)
    for _ in range(2):
        for q in basis:
            random = random - _dot(q, random)[..., None].to(random.dtype) * q
    vector = torch.where(norm == 0, random, vector)
    return vector / _norm(vector)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1).double()


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)
