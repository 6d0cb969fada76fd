"""Products of matrices that differ from step to step, and their growth rates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lsp_callbacks.linalg.operator import LinearOperator


def push(operator: LinearOperator, frame: Tensor) -> Tensor:
    """Apply ``A`` to each of the ``k`` rows of ``frame``, ``(k, n) -> (k, n)``."""
    return torch.stack([operator.apply(vector) for vector in frame])


def orthonormalise(frame: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Orthonormalise a frame in the norm ``||weight * z||``, by QR.

    Args:
        frame: ``(k, n)``, rows.
        weight: positive, a number or ``(m,)`` with ``m <= n``: the other columns have no part in the norm, and
            undergo the same combinations of rows.

    Returns:
        The frame with ``weight * rows`` orthonormal, and ``log |R_ii|``, ``(k,)`` in float64.
    """
    head = frame[:, : len(weight)] if isinstance(weight, Tensor) else frame
    carried = frame[:, head.shape[1] :]
    q, r = torch.linalg.qr((head * weight).mT)
    if carried.shape[1]:
        carried = torch.linalg.solve_triangular(r.mT, carried, upper=False)
    return torch.cat([q.mT / weight, carried], dim=1), r.diagonal().abs().double().log()


def lyapunov_exponents(
    operators: Iterable[LinearOperator], frame: Tensor, *, transient: int = 0, weight: Tensor | float = 1.0
) -> Tensor:
    """Return local growth rates ``log |R_ii|`` of a product of matrices (Benettin et al. 1980).

    Args:
        operators: ``A_1, A_2, ...`` in the order in which they are applied.
        frame: ``(k, n)``, the initial directions, independent.
        transient: how many steps to skip before recording, while the frame turns into the leading directions.
        weight: of the norm.

    Returns:
        ``(steps - transient, k)`` in nats per step; the mean over steps estimates the ``k`` leading exponents.

    Raises:
        ValueError: if ``transient`` leaves no step to record.

    Cost: ``k`` products and one QR for each step.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix, lyapunov_exponents
        >>> A = from_matrix(torch.diag(torch.tensor([2.0, 0.5])))
        >>> lyapunov_exponents([A] * 10, torch.eye(2)).mean(0)
        tensor([ 0.6931, -0.6931], dtype=torch.float64)
    """
    logs = []
    frame, _ = orthonormalise(frame, weight)
    for operator in operators:
        frame, log = orthonormalise(push(operator, frame), weight)
        logs.append(log)
    if len(logs) <= transient:
        raise ValueError(f"transient={transient} leaves none of {len(logs)} steps: lower it or give more steps")
    return torch.stack(logs[transient:])


def spectral_radius(matrix: Tensor) -> Tensor:
    """Return the largest |eigenvalue| of a small square matrix; NaN where an entry is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.tensor(math.nan, dtype=torch.float64)
    return torch.linalg.eigvals(matrix.double()).abs().max()
