"""The sharpest direction of a step's loss, and how far the step is from its edge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.stability_constant import stability_constant
from lsp_callbacks.linalg import Eigenpair, LinearOperator, lanczos, spectrum_bounds, unit
from lsp_callbacks.operators.curvature.finite_differences import ACCEPTED, TOLERANCE
from lsp_callbacks.operators.curvature.hessian import Method, hessian, products_so_far
from lsp_callbacks.operators.trajectory.coming_preconditioner import coming_rule
from lsp_callbacks.operators.trajectory.frozen_preconditioner import (
    FrozenRule,
    buffer_rates,
    coupled_decay,
    decay_rates,
    decayed_hessian,
    preconditioned_hessian,
    rates,
)
from lsp_callbacks.step.snapshot import Snapshot

#: Probability, over the random part of a start, that an eigenvalue lies beyond the error bar.
FAILURE = 0.05


@dataclass(frozen=True)
class StabilityThreshold:
    """A step in relation to the edge of stability of its optimizer.

    Attributes:
        sharpness: ``lambda_max(H)``, algebraic, of the step's loss.
        error: ``lambda_max(H)`` is at most ``sharpness + error |sharpness|``, see `top_eigenvalue`.
        courant_error: the same for ``courant``; equal to ``error`` where one run gives both.
        accuracy: relative error of the products behind ``courant``, by which it may be too large.
        residual: ``||H v - lambda v|| / |lambda|`` of the pair behind ``courant``: of that eigenvector, not of the top.
        courant: ``lambda_max(R^1/2 H' R^1/2) / c``: 1 is the edge.
        limit: ``lambda_max(H') / courant``, the sharpness at which the step would be at its edge; NaN at rate 0.
        mode: unit eigenvector of ``R^1/2 H' R^1/2``, flat.
        top: unit eigenvector of H, flat; the mode itself where R is one number.
        root: ``sqrt(R)`` of each parameter, which turns ``mode`` into a displacement of the parameters.
        buffer_scale: turns ``mode`` into the momentum buffer that displaces by ``root * mode``; None without momentum.
        products: how many Hessian products were used.
        converged: whether the error bars met the tolerance.
    """

    sharpness: Tensor
    error: Tensor
    courant_error: Tensor
    accuracy: Tensor
    residual: Tensor
    courant: Tensor
    limit: Tensor
    mode: Tensor
    top: Tensor
    root: Tensor | float
    buffer_scale: Tensor | float | None
    products: int
    converged: bool


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
        >>> from lsp_callbacks.operators.curvature.stability_threshold import top_eigenvalue
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()  # H = diag(1, 9) for 0.5 * sum of squares
        >>> float(top_eigenvalue(Snapshot(step=0, module=net, replay=lambda: 0.5 * net(x).square().sum())).value)
        9.0...
    """
    return _top(hessian(snapshot, method=method), snapshot, start, steps, tol).pair


def threshold_constant(rule: FrozenRule) -> float:
    """Return the `stability_constant` of a rule; decoupled weight decay multiplies it by ``1 - lr wd / 2``.

    With ``v+ = (1 - lr wd) v - R m+``, ``m+ = beta m + (1 - tau) h v`` an eigenvalue is -1 where ``R h (1 - tau) =
    (2 - lr wd) (1 + beta)``. If decays differ, the largest is used: then the step may become unstable a little later
    than at Courant number 1.

    Raises:
        Unmeasurable: where the decay alone is unstable.
    """
    decay = rule.lr * max(rule.decoupled_decay.values(), default=0.0)
    if decay >= 2:
        raise Unmeasurable(
            f"lr * weight_decay = {decay:.3g} is unstable by itself: lower one of them, so that it is below 2"
        )
    return stability_constant(rule.momentum, rule.dampening, rule.nesterov) * (1 - decay / 2)


def stability_threshold(
    snapshot: Snapshot,
    *,
    start: Tensor | None = None,
    top: Tensor | None = None,
    steps: int = 20,
    tol: float = 1e-3,
    method: Method = "auto",
) -> StabilityThreshold:
    """Return sharpness, its limit, and the Courant number ``lambda_max(R^1/2 H' R^1/2) / c`` of a step.

    R are the effective rates of the parameters: the learning rate times the preconditioner of Adam, AdamW, RMSprop
    or Adagrad over Adam's bias correction, held fixed as they will be some ten steps later (`coming_rule`), times
    the factor by which this step's gradient was clipped, held fixed too. H' is the Hessian with coupled weight
    decay. With one rate and one weight decay everything follows from one Lanczos run on H; otherwise the
    preconditioned operator needs a run of its own. It holds for full-batch steps; under momentum it does not
    account for batch noise.

    Args:
        snapshot: a step with its optimizer.
        start: an earlier ``mode``; None starts from gradient and noise.
        top: an earlier ``top``, likewise.
        steps: at most this many products for each run.
        tol: on the relative error bars.
        method: of the Hessian products.

    Raises:
        Unmeasurable: optimizer not supported, momentum that differs between groups, loss that cannot be replayed.

    Source: docs/theory.md, section 3; Cohen et al. 2021; Cohen et al. 2022 for preconditioned gradients.
    """
    rule = coming_rule(snapshot)
    constant, maximize = threshold_constant(rule), rule.sign < 0
    rate, decay = rates(snapshot, rule), decay_rates(snapshot, rule)
    root = rate**0.5 if rule.lr else 1.0
    added = coupled_decay(snapshot)

    def top_of(operator: LinearOperator, start: Tensor | None) -> _Top:
        return _top(operator, snapshot, start, steps, tol)

    shift: Tensor | float
    if isinstance(rate, Tensor) or isinstance(decay, Tensor):
        plain = top_of(hessian(snapshot, method=method), top)
        steepest = top_of(preconditioned_hessian(snapshot, method=method, rule=rule), start)
        if maximize or isinstance(added, Tensor):
            decayed = top_of(decayed_hessian(snapshot, method=method), plain.pair.vector).pair.value
        else:
            decayed = plain.pair.value + added
        scale, shift = 1.0, 0.0
    else:
        plain = steepest = top_of(hessian(snapshot, method=method), top if maximize else start)
        if maximize:
            steepest = top_of(decayed_hessian(snapshot, method=method), start)
        scale, shift = rate, 0.0 if maximize else decay / rate if rate else added
        decayed = steepest.pair.value + shift
    pair = steepest.pair
    courant = scale * (pair.value + shift) / constant
    return StabilityThreshold(
        sharpness=plain.pair.value,
        error=_relative(plain.missed, plain.pair.value),
        courant_error=_relative(steepest.missed, pair.value + shift),
        accuracy=_relative(steepest.accuracy, pair.value + shift),
        residual=_relative(pair.residual, pair.value),
        courant=courant,
        limit=decayed / courant,
        mode=pair.vector,
        top=plain.pair.vector,
        root=root,
        buffer_scale=_buffer_scale(root, buffer_rates(snapshot, rule)) if rule.momentum else None,
        products=pair.products + (plain.pair.products if plain is not steepest else 0),
        converged=plain.pair.converged and pair.converged,
    )


def _relative(error: Tensor, value: Tensor) -> Tensor:
    """Return an error relative to a value; 0 where both are 0."""
    return error / value.abs().clamp_min(torch.finfo(torch.float64).tiny)


def _buffer_scale(root: Tensor | float, buffer: Tensor | float) -> Tensor | float:
    """Return ``root / buffer``, and 0 where the buffer moves nothing."""
    if isinstance(buffer, Tensor):
        return torch.where(buffer > 0, root / buffer, 0.0)
    return root / buffer if buffer else 1.0


@dataclass(frozen=True)
class _Top:
    """The largest eigenpair of an operator.

    Attributes:
        pair: with its upper bound.
        accuracy: error of the products, in their units.
    """

    pair: Eigenpair
    accuracy: Tensor

    @property
    def missed(self) -> Tensor:
        """Return the distance from the value to its upper bound."""
        assert self.pair.upper is not None
        return self.pair.upper - self.pair.value


def _top(operator: LinearOperator, snapshot: Snapshot, start: Tensor | None, steps: int, tol: float) -> _Top:
    """Run Lanczos from equal parts of ``start``, gradient and noise, until the error bar is small."""
    n = operator.shape[1]
    noise = torch.randn(n, generator=snapshot.generator("lanczos"), dtype=operator.dtype).to(operator.device)
    mixed = unit(noise)
    for other in (snapshot.flat_gradient, start):
        if other is not None and len(other) == n and bool(torch.isfinite(other).all()):
            mixed = mixed + unit(other.to(mixed))
    share = 1 / max(1.0, float(torch.linalg.vector_norm(mixed)))
    products = products_so_far(snapshot)
    before = products.taken
    ritz = lanczos(operator, mixed, steps=steps, tol=tol if steps < n else 0.0, failure=FAILURE, share=share)
    pair = ritz.pair(-1)
    rough = products.taken > before  # some of them, where exact products have taken over
    accuracy = _accuracy(snapshot, operator.dtype, rough) * ritz.values.abs().amax()
    upper = torch.maximum(spectrum_bounds(ritz, failure=FAILURE, share=share)[1], pair.value) + accuracy
    return _Top(replace(pair, upper=upper), accuracy)


def _accuracy(snapshot: Snapshot, dtype: torch.dtype, rough: bool) -> float:
    """Return the error of values relative to the largest eigenvalue: of products by differences, or by rounding."""
    if rough:
        return ACCEPTED * min(TOLERANCE * torch.finfo(dtype).eps ** 0.5, 0.01)
    return max(2 * torch.finfo(snapshot.graph.dtype).eps, 16 * torch.finfo(dtype).eps)
