"""The top of SGD's second moment by its noise, which is of low rank: some products find it to a few per mille."""

from __future__ import annotations

from torch import Tensor, linalg


def top_by_noise(
    rows: Tensor, source: Tensor, fixed: Tensor, tol: float, *, steps: int = 40
) -> tuple[float, Tensor] | None:
    """Return the largest x at which ``X -> (x source - fixed) * X - sum_i (y_i^T X y_i) y_i y_i^T`` is singular, and X.

    All but the sum is elementwise. What the sum gives is ``sum_i c_i y_i y_i^T``, and eliminating X leaves
    ``c = M(x) c``, ``M_ij = sum_kl y_ik y_il y_jk y_jl / (x source - fixed)_kl``: a problem of as many numbers as there
    are rows, whose largest eigenvalue falls with x. Each step solves ``<c, M(x) c> = <c, c>`` for x, which is
    elementwise, and multiplies c by M(x); X has ``<X, source X> = 1``. The Rayleigh quotient is at most the eigenvalue, so x comes from below.

    Args:
        rows: y, ``(N, r)``.
        source: positive, ``(r, r)``.
        fixed: ``(r, r)``.
        tol: relative, of x. What it may lack, the residual over the slope of the quotient, is added to it.
        steps: at most this many.

    Returns:
        None where it did not converge.

    Cost: ``4 N r^2`` a step.
    """
    size = rows.square().sum(1)
    rows = rows[size > 0]
    c = size[size > 0]  # positive, as the first eigenvector of a positive M, and larger where a sample is sharp
    x = 0.0
    for k in range(steps):
        c = c / linalg.vector_norm(c)
        combined = rows.mT @ (c[:, None] * rows)
        squares = combined.square()
        if not k:  # one term alone reaches 1 below the root; 1 / f is concave: Newton's method rises to it from there
            x = float(((fixed + squares) / source).max())
        for _ in range(50):
            left = (x * source).sub_(fixed)
            terms = squares / left
            f, slope = float(terms.sum()), float(terms.mul_(source).div_(left).sum())
            rise = f * (f - 1) / slope if slope > 0 else float("nan")
            if not rise > 0.1 * tol * x:
                break
            x += rise
        if not (slope > 0 and x > 0 and f < float("inf")):
            return None
        solution = combined / left
        image = ((rows @ solution) * rows).sum(1)
        lacks = float(linalg.vector_norm(image - f * c)) / slope + max(rise, 0.0)
        if k > 1 and lacks <= tol * x:  # not at first, where c may pass by another eigenvector
            return x + lacks, solution / float((source * solution).mul_(solution).sum()) ** 0.5
        c = image
    return None
