"""The largest eigenvalue of a step's Hessian, by Lanczos until its bound is near."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg import Eigenpair, LinearOperator, lanczos, spectrum_bounds, unit
from lsp_callbacks.operators.curvature.finite_differences import ACCEPTED, TOLERANCE
from lsp_callbacks.operators.curvature.hessian import Method, hessian, products_so_far
from lsp_callbacks.step.snapshot import Snapshot

#: Probability, over the random part of a start, that an eigenvalue lies beyond the error bar.
FAILURE = 0.05


@dataclass(frozen=True)
class Top:
    """The largest eigenpair of an operator.

    Attributes:
        value: the eigenvalue.
        vector: unit vector, flat.
        error: the largest eigenvalue is within this distance of the value, in its units.
        accuracy: error of the products, likewise: the quotient of the vector may be too large by it.
        beyond: the largest eigenvalue is at most this much above the quotient of the vector.
        products: how many were taken.
        early: the value after the first of them, to be compared with that of other steps.
        carried: what the next step starts from.
        pair: the same with its residual and an upper bound, where Lanczos was run until that was near.
    """

    value: Tensor
    vector: Tensor
    error: Tensor
    accuracy: Tensor
    beyond: Tensor
    products: int
    early: Tensor
    carried: Tensor
    pair: Eigenpair | None = None


def top_eigenvalue(
    snapshot: Snapshot,
    *,
    start: Tensor | None = None,
    steps: int = 20,
    tol: float = 1e-3,
    method: Method = "auto",
) -> Eigenpair:
    """Return the largest *algebraic* eigenvalue of the Hessian of a step's loss, with an upper bound.

    Lanczos from equal parts of an earlier eigenvector, the gradient and noise. A residual bounds the distance to *some*
    eigenvalue: the earlier mode keeps a small one while another mode becomes the largest. The noise overlaps with every
    mode: ``upper`` is the bound of `lsp_callbacks.linalg.spectrum_bounds` by its share of the start, and fails with a
    probability of at most 5 %. Gradient and earlier vector lean towards sharp directions (Gur-Ari et al. 2018), which
    makes a failure far rarer: see ``benchmarks/sharpness_error_bars.md``.

    Args:
        snapshot: a step; no optimizer is needed.
        start: flat vector to start from, for instance the last eigenvector; None starts from gradient and noise. A
            vector of another size, or that is not finite, is ignored.
        steps: at most this many products; with one for each parameter the result is exact, and they are taken.
        tol: on ``upper - value``, relative.
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Returns:
        Value, which is a lower bound, unit vector, residual, and ``upper``. Products by differences give values to
        2 % in float32: ``upper`` is never nearer, and the lower bound holds up to that.

    Raises:
        Unmeasurable: see `lsp_callbacks.operators.hessian`.

    Cost: one product for each step. Source: Cohen et al. 2021 (edge of stability).

    Example:
        >>> import torch
        >>> from lsp_callbacks import Snapshot
        >>> from lsp_callbacks.operators.curvature.top_eigenvalue import top_eigenvalue
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()  # H = diag(1, 9) for 0.5 * sum of squares
        >>> float(top_eigenvalue(Snapshot(step=0, module=net, replay=lambda: 0.5 * net(x).square().sum())).value)
        9.0...
    """
    pair = bounded_top(hessian(snapshot, method=method), snapshot, start, steps=steps, tol=tol).pair
    assert pair is not None
    return pair


def bounded_top(
    operator: LinearOperator,
    snapshot: Snapshot,
    start: Tensor | None,
    *,
    steps: int,
    tol: float,
    root: Tensor | float = 1.0,
) -> Top:
    """Return the largest eigenpair of an operator, see `top_eigenvalue`; ``root``: see `gradient_behind`."""
    n = operator.shape[1]
    noise = torch.randn(n, generator=snapshot.generator("lanczos"), dtype=operator.dtype).to(operator.device)
    mixed = unit(noise)
    for other in (gradient_behind(snapshot, root), start):
        if other is not None and len(other) == n and bool(torch.isfinite(other).all()):
            mixed = mixed + unit(other.to(mixed))
    share = 1 / max(1.0, float(torch.linalg.vector_norm(mixed)))
    products = products_so_far(snapshot)
    before = products.taken
    ritz = lanczos(operator, mixed, steps=steps, tol=tol if steps < n else 0.0, failure=FAILURE, share=share)
    products.end_run()
    pair = ritz.pair(-1)
    # Some of them were differences, where exact products have taken over.
    accuracy = accuracy_of(snapshot, operator.dtype, products.taken > before) * ritz.values.abs().amax()
    upper = torch.maximum(spectrum_bounds(ritz, failure=FAILURE, share=share)[1], pair.value) + accuracy
    missed = upper - pair.value
    value, vector, bounded = pair.value, pair.vector, replace(pair, upper=upper)
    return Top(value, vector, missed, accuracy, missed, pair.products, value, vector, bounded)


def gradient_behind(snapshot: Snapshot, root: Tensor | float) -> Tensor | None:
    """Return the step's gradient in the coordinates of ``R^1/2 H R^1/2``, which are ``R^-1/2 theta``: ``R^1/2 g``.

    It leans towards the sharp modes of that operator as g leans towards those of H. Without ``R^1/2`` it does not know
    the parameters that move furthest: in Adam's first steps rates differ by a factor of a million, and where a gradient
    has been rare, a small one is the sharpest mode.
    """
    gradient = snapshot.flat_gradient
    return gradient if gradient is None or isinstance(root, float) else root * gradient


def accuracy_of(snapshot: Snapshot, dtype: torch.dtype, rough: bool) -> float:
    """Return the error of values relative to the largest eigenvalue: of products by differences, or by rounding."""
    if rough:
        return ACCEPTED * min(TOLERANCE * torch.finfo(dtype).eps ** 0.5, 0.01)
    return max(2 * torch.finfo(snapshot.graph.dtype).eps, 16 * torch.finfo(dtype).eps)
