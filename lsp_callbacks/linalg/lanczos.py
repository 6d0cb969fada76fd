"""The Lanczos iteration: extreme eigenvalues of a symmetric operator, from its products."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.linalg.operator import LinearOperator, norm
from lsp_callbacks.linalg.ritz import Ritz
from lsp_callbacks.linalg.spectrum_bounds import within


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
    """Compute extreme eigenvalues of a symmetric operator, or of a batch of them at once.

    ``A Q = Q T + beta q e^T`` with full reorthogonalisation; the eigenvalues of ``T = Q^T A Q`` are the Ritz values,
    and ``|beta s_k|`` their residuals. T is filled with the measured overlaps of each product with all earlier vectors,
    not with the ``beta`` that built them: with inexact products those would be biased upwards. Where an invariant
    subspace is found (``beta = 0``) the iteration continues in a new random direction with coupling 0, and the ends
    that must converge are those of the newest block, so that a start vector that is itself an eigenvector cannot hide
    the rest of the spectrum.

    Args:
        operator: symmetric, ``(*batch, n) -> (*batch, n)``.
        start: ``(*batch, n)``, not zero, for instance the vector of an earlier run.
        steps: at most this many products.
        tol: stop when the residual of every end in ``ends`` is at most ``tol`` times the largest |value|.
        ends: which ends must converge: -1 the algebraically largest, 0 the smallest.
        failure: requires more than a small residual, which bounds the distance to *some* eigenvalue only: the bound of
            `spectrum_bounds` beyond each end, which fails with this probability, must be within the tolerance.
        share: norm of the random part of the start; see there.
        generator: of the new directions; None draws from a fixed seed, never from the global state.

    Returns:
        Ritz values with residuals, in float64 whatever the dtype of the vectors.

    Cost: one product for each step, and the memory of ``steps`` vectors. Source: Golub & Van Loan, Matrix
    Computations, 10.1; Parlett 1980, 13.2.
    """
    n = operator.shape[1]
    steps = min(steps, n)
    # Not a seed that a caller would use for the start: a new direction must differ from it.
    generator = generator or torch.Generator(start.device).manual_seed(2**31 - 1)
    eps = torch.finfo(start.dtype).eps
    basis = start.new_empty(steps, *start.shape)
    projected = torch.zeros(*start.shape[:-1], steps, steps, dtype=torch.float64)
    basis[0] = _unit(start, generator, basis[:0])
    origin = torch.zeros(start.shape[:-1], dtype=torch.long)  # where the newest block begins
    for k in range(steps):
        w = operator.apply(basis[k])
        w, overlap = _orthogonalise(w, basis[: k + 1])
        w, _ = _orthogonalise(w, basis[: k + 1])  # once is not enough, by Kahan's "twice is enough"
        # The one place where a step waits for the device.
        size = norm(w, -1, keepdim=True)
        *column, beta = torch.stack([*overlap.double(), size[..., 0]]).cpu()
        projected[..., : k + 1, k] = projected[..., k, : k + 1] = torch.stack(column, dim=-1)
        values, coefficients = _eigh(projected[..., : k + 1, : k + 1])
        residuals = (beta[..., None] * coefficients[..., -1, :]).abs()
        scale = values.abs().amax(-1)
        finite = bool(torch.isfinite(values).all())
        broken = beta <= 8 * eps * scale
        if failure is None:
            met = torch.stack([_converged(values, coefficients, residuals, origin, end, tol) for end in ends]).all(0)
            # A first block that ends does not contain what the start lacked; a random one has seen all the rest.
            met = torch.where(broken, origin > 0, met)
        else:
            so_far = Ritz(values, residuals, coefficients, basis[: k + 1], False)
            met = within(so_far, [1 if end else -1 for end in ends], failure=failure, share=share, tol=tol)
        small = bool(met.all())
        # A single product cannot tell an eigenvector from the top one.
        converged = finite and (k + 1 == n or (small and k > 0))
        if converged or not finite or k + 1 == steps:
            break
        if bool(broken.any()):
            origin = torch.where(broken, k + 1, origin)
            fresh = _unit(torch.zeros_like(w), generator, basis[: k + 1])
            w = torch.where(broken[..., None].to(w.device), fresh, w)
            size = norm(w, -1, keepdim=True)
        basis[k + 1] = w / size.to(w.dtype)
    return Ritz(values, residuals, coefficients, basis[: k + 1], converged)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(matrix).all()):  # LAPACK would raise: return NaN instead
        return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _converged(values: Tensor, coefficients: Tensor, residuals: Tensor, origin: Tensor, end: int, tol: float) -> Tensor:
    """Return whether an end of the block that begins at ``origin`` has converged; the blocks before it are exact."""
    rows = torch.arange(values.shape[-1])
    share = (coefficients.square() * (rows >= origin[..., None])[..., None]).sum(-2)
    newest = torch.where(share > 0.5, values, torch.nan)
    index = newest.nan_to_num(-torch.inf).argmax(-1) if end else newest.nan_to_num(torch.inf).argmin(-1)
    residual = residuals.gather(-1, index[..., None])[..., 0]
    return residual <= tol * newest.abs().nan_to_num(0.0).amax(-1)


def _unit(vector: Tensor, generator: torch.Generator, basis: Tensor) -> Tensor:
    """Return a vector normalised; where it vanishes, a random direction orthogonal to ``basis``."""
    size = norm(vector, -1, keepdim=True)
    if bool((size == 0).any()):
        random = random_start(vector.shape, vector.dtype, vector.device, generator)
        for _ in range(2):
            random, _ = _orthogonalise(random, basis)
        vector = torch.where(size == 0, random, vector)
        size = norm(vector, -1, keepdim=True)
    return vector / size.to(vector.dtype)


def random_start(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Tensor:
    """Return Gaussian numbers, drawn on the device of the generator."""
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).to(device)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.einsum("k...n,...n->k...", basis, w)
    return w - torch.einsum("k...,k...n->...n", overlap, basis), overlap
