"""Condition numbers: of a layer as it is applied, and of the loss along its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, lanczos

#: Up to this many rows or columns, whichever are fewer, a layer is made dense.
SMALL = 256


def condition(operator: LinearOperator, *, precision: torch.dtype | None = None) -> tuple[Tensor, int]:
    """Return ``sigma_1 / sigma_r`` of a small operator, by the singular values of its dense matrix.

    r is the numerical rank: singular values up to ``max(m, n) eps sigma_1`` count as 0, as in
    ``torch.linalg.matrix_rank``.

    Args:
        operator: without batch axes.
        precision: whose eps that is; None takes the operator's. In half precision small singular values are rounding.

    Returns:
        The condition number in float64, NaN for the zero operator or one with NaN, and r.

    Cost: as many products as its shorter side is long, and one singular value decomposition.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import condition
        >>> from lsp_callbacks.linalg import from_matrix
        >>> value, rank = condition(from_matrix(torch.diag(torch.tensor([6.0, 3.0, 0.0]))))
        >>> float(value), rank
        (2.0, 2)
    """
    m, n = operator.shape
    matrix = (operator.T.dense() if m < n else operator.dense()).double()
    if not bool(torch.isfinite(matrix).all()):
        return torch.tensor(torch.nan, dtype=torch.float64), 0
    eps = torch.finfo(precision or operator.dtype).eps
    if eps > 1e-8:  # what counts is far above the rounding of the Gram matrix in float64, which is quicker
        values = torch.linalg.eigvalsh(matrix.T @ matrix).flip(0).clamp_min(0).sqrt()
    else:
        values = torch.linalg.svdvals(matrix)
    kept = values[values > max(m, n) * eps * values[0]] if len(values) else values
    if not len(kept):
        return torch.tensor(torch.nan, dtype=torch.float64), 0
    return kept[0] / kept[-1], len(kept)


def condition_lower(operator: LinearOperator, *, steps: int = 12, generator: torch.Generator | None = None) -> Tensor:
    """Return a lower bound of ``sigma_1 / sigma_r``, from the Ritz values of the smaller of ``A A^T`` and ``A^T A``.

    Ritz values lie between the smallest and the largest nonzero eigenvalue, since the iteration starts in the range.
    The largest is found soon, the smallest seldom: the bound can be far below the truth.

    Args:
        operator: with an adjoint.
        steps: pairs of products.
        generator: for the start.

    Returns:
        In float64; NaN for the zero operator.
    """
    if operator.shape[0] > operator.shape[1]:
        operator = operator.T
    generator = generator or torch.Generator(operator.device).manual_seed(0)
    z = torch.randn(operator.shape[1], dtype=operator.dtype, device=operator.device, generator=generator)
    start = operator @ z
    if not bool(start.any()) or not bool(torch.isfinite(start).all()):
        return torch.tensor(torch.nan, dtype=torch.float64)
    values = lanczos(operator @ operator.T, start, steps=steps, tol=0.0, ends=(0, -1)).values
    # Smaller ones are rounding errors of the product.
    kept = values[values > 100 * torch.finfo(operator.dtype).eps * values[-1]]
    return (kept[-1] / kept[0]).sqrt() if len(kept) else torch.tensor(torch.nan, dtype=torch.float64)


def loss_condition_lower(hessian: LinearOperator, gradient: Tensor, *, steps: int = 5) -> Tensor | None:
    """Return ``lambda_max ||g||^2 / (g^T H g)``: how much flatter the loss is along g than along its sharpest mode.

    At the largest stable rate ``2 / lambda_max`` a step of gradient descent takes the share ``2 / kappa`` off the
    gradient along itself. For a convex quadratic loss it is a lower bound of ``lambda_max / lambda_min`` over the
    nonzero eigenvalues, as g lies in the range of H. The smallest eigenvalue of a network's Hessian itself cannot be
    found: it is lost in a bulk around 0, and on the way there are negative ones.

    Args:
        hessian: symmetric.
        gradient: flat.
        steps: products; the largest Ritz value of a Lanczos run from g stands for ``lambda_max``, a lower bound.

    Returns:
        None where the gradient vanishes or points along negative curvature: there is no such number.

    Source: Nocedal & Wright 2006, (3.29) for the rate; Cohen et al. 2021 for the edge.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import loss_condition_lower
        >>> from lsp_callbacks.linalg import from_matrix
        >>> H = torch.diag(torch.tensor([9.0, 1.0, 0.0]))
        >>> round(float(loss_condition_lower(from_matrix(H), H @ torch.tensor([0.01, 1.0, 1.0]))), 3)
        8.456
    """
    if not bool(gradient.any()) or not bool(torch.isfinite(gradient).all()):
        return None
    ritz = lanczos(hessian, gradient, steps=steps, tol=0.0)
    along = (ritz.coefficients[0].square() * ritz.values).sum()  # g^T H g, in the basis that begins with g
    return ritz.values[-1] / along if bool(along > 0) else None
