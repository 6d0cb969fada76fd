"""The sharpest direction of a step's loss, and how far the step is from its edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.stability_constant import stability_constant
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.followed_top import FEW, RECENT, Earlier, followed_top, followed_tops
from lsp_callbacks.operators.curvature.hessian import Method, hessian
from lsp_callbacks.operators.curvature.top_eigenvalue import Top, bounded_top
from lsp_callbacks.operators.trajectory.coming_preconditioner import coming_rule
from lsp_callbacks.operators.trajectory.frozen_preconditioner import (
    FrozenRule,
    StepConstants,
    buffer_rates,
    coupled_decay,
    decay_rates,
    decayed_hessian,
    preconditioned_hessian,
    rates,
    require_gradient,
    root_rates,
    step_constants,
)
from lsp_callbacks.step.snapshot import Snapshot

#: ``R^1/2`` of each parameter, or of all.
Root = Tensor | float


@dataclass(frozen=True)
class Recent:
    """Values of the last steps, with which the next is compared.

    Attributes:
        tops: the sharpness.
        modes: the largest eigenvalue behind ``courant``, divided by the learning rate.
    """

    tops: tuple[float, ...] = ()
    modes: tuple[float, ...] = ()

    def with_values(self, top: Tensor, mode: Tensor) -> Recent:
        """Return these values and one more of each."""
        return Recent((*self.tops, float(top))[-RECENT:], (*self.modes, float(mode))[-RECENT:])


#: Before the first step.
NOTHING = Recent()


@dataclass(frozen=True, kw_only=True)
class SharpMode:
    """The sharpest direction of a step's loss in the metric of its optimizer.

    Attributes:
        mode: unit eigenvector of ``R^1/2 H' R^1/2``, flat.
        root: ``sqrt(R)`` of each parameter, which turns ``mode`` into a displacement of the parameters.
        buffer: ``() ->`` `buffer_rates` of the step; None without momentum.
        accuracy: relative error of products: the quotient of ``mode`` may be above the largest eigenvalue by it.
        beyond: the largest eigenvalue may be above the quotient of ``mode`` by it, relatively.
        carried: what the next step starts from, in the coordinates of ``mode``.
        eigenvalue: the estimate of the largest eigenvalue of H, and how far that may be from it, relatively, where
            ``mode`` is the sharpest direction of H as well; None elsewhere.
    """

    mode: Tensor
    root: Tensor | float
    buffer: Callable[[], Tensor | float] | None
    accuracy: Tensor
    beyond: Tensor
    carried: Tensor
    eigenvalue: tuple[Tensor, Tensor] | None = None

    @property
    def buffer_scale(self) -> Tensor | float | None:
        """Return what turns ``mode`` into the buffer that displaces by ``root * mode``; None without momentum.

        It is 0 where the buffer moves nothing.
        """
        if self.buffer is None:
            return None
        buffer = self.buffer()
        if isinstance(buffer, Tensor):
            return torch.where(buffer > 0, self.root / buffer, 0.0)
        return self.root / buffer if buffer else 1.0


@dataclass(frozen=True, kw_only=True)
class StabilityThreshold(SharpMode):
    """A step in relation to the edge of stability of its optimizer, with its `SharpMode`.

    Attributes:
        sharpness: ``lambda_max(H)``, algebraic, of the step's loss.
        error: ``lambda_max(H)`` is within ``error |sharpness|`` of it, see `top_eigenvalue` and `followed_top`.
        courant_error: the same for ``courant``; NaN where ``error`` is that of both, as H' is H and has one rate.
        courant: ``lambda_max(R^1/2 H' R^1/2) / c``: 1 is the edge.
        limit: ``lambda_max(H') / courant``, the sharpness at which the step would be at its edge; NaN at rate 0.
        top: unit eigenvector of H, flat; the mode itself where R is one number.
        carried_top: what the next step starts from, likewise.
        products: how many Hessian products were used.
        recent: values of this and earlier steps, for the next.
    """

    sharpness: Tensor
    error: Tensor
    courant_error: Tensor
    courant: Tensor
    limit: Tensor
    top: Tensor
    carried_top: Tensor
    products: int
    recent: Recent


def threshold_constant(rule: StepConstants) -> float:
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
    constant = stability_constant(rule.momentum, rule.dampening, rule.nesterov, direct=rule.direct)
    return constant * (1 - decay / 2)


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

    R are the effective rates of the parameters: the learning rate times the preconditioner of Adam, its variants,
    RMSprop or Adagrad over Adam's bias correction, held fixed as they will be some ten steps later (`coming_rule`),
    times the factor by which this step's gradient was clipped, held fixed too. H' is the Hessian with coupled weight
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

    def find(operator: LinearOperator, start: Tensor | None, recent: Sequence[float], root: Root = 1.0) -> Top:
        return bounded_top(operator, snapshot, start, steps=steps, tol=tol, root=root)

    return _threshold(snapshot, start, top, find, method)


def followed_threshold(
    snapshot: Snapshot,
    *,
    start: Tensor | None = None,
    top: Tensor | None = None,
    recent: Recent = NOTHING,
    method: Method = "auto",
) -> StabilityThreshold:
    """Return what `stability_threshold` does, followed from an earlier step by few products: see `followed_top`.

    Args:
        snapshot: a step with its optimizer.
        start: an earlier ``mode``.
        top: an earlier ``top``.
        recent: values of earlier steps.
        method: of the Hessian products.

    Raises:
        Unmeasurable: see `stability_threshold`.
    """

    def find(operator: LinearOperator, start: Tensor | None, recent: Sequence[float], root: Root = 1.0) -> Top:
        return followed_top(operator, snapshot, start, recent, root)

    def both(operator: LinearOperator, root: Tensor, plain: Earlier, steepest: Earlier) -> list[Top]:
        return followed_tops(operator, snapshot, [plain, replace(steepest, root=root)], snapshot.flat_gradient)

    return _threshold(snapshot, start, top, find, method, recent, both)


def followed_mode(snapshot: Snapshot, *, start: Tensor | None = None, method: Method = "auto") -> SharpMode:
    """Return the sharp mode alone, followed from an earlier one, where H itself would take products of its own.

    That is with a preconditioner, and where rates or coupled decays differ: see `has_own_run`.

    Args:
        snapshot: a step with its optimizer.
        start: an earlier ``mode``.
        method: of the Hessian products.

    Raises:
        Unmeasurable: see `stability_threshold`.

    Cost: half the products of `followed_threshold`.
    """
    rule = coming_rule(snapshot)
    threshold_constant(rule)
    scale = root_rates(snapshot, rule)
    root = scale if rule.lr else 1.0
    operator = preconditioned_hessian(snapshot, method=method, rule=rule, root=scale)
    steepest = followed_top(operator, snapshot, start, (), root)
    return SharpMode(**_mode(snapshot, rule, steepest, root, steepest.value))


def has_own_run(snapshot: Snapshot) -> bool:
    """Return whether ``R^1/2 H' R^1/2`` has other eigenvectors than H."""
    if step_constants(snapshot).frozen:
        require_gradient(snapshot)
        return True
    return isinstance(rates(snapshot), Tensor) or isinstance(decay_rates(snapshot), Tensor)


def may_share_products(snapshot: Snapshot) -> bool:
    """Return whether products of H are those of ``R^1/2 H' R^1/2``, too, if each parameter moves: see `followed_tops`.

    Then H' is H: nothing is maximized, and no decay is coupled. Of few parameters each operator is measured to the end.

    Cost: nothing.
    """
    if step_constants(snapshot).sign < 0 or snapshot.gradient is None:
        return False
    decay = coupled_decay(snapshot)
    return not isinstance(decay, Tensor) and not decay and snapshot.size > FEW


def _shares_products(snapshot: Snapshot, root: Root) -> bool:
    if not (isinstance(root, Tensor) and may_share_products(snapshot)):
        return False
    stays = not (bool((root > 0).all()) and bool(root.isfinite().all()))
    return not (stays if snapshot.held is None else snapshot.run.ranks.any_true(stays, "whether each parameter moves"))


def _mode(snapshot: Snapshot, rule: FrozenRule, steepest: Top, root: Tensor | float, value: Tensor) -> dict[str, Any]:
    """Return the fields of `SharpMode`, of which errors are relative to a value."""
    return {
        "mode": steepest.vector,
        "root": root,
        "buffer": partial(buffer_rates, snapshot, rule) if rule.momentum else None,
        "accuracy": _relative(steepest.accuracy, value),
        "beyond": _relative(steepest.beyond, value),
        "carried": steepest.carried,
    }


def _threshold(
    snapshot: Snapshot,
    start: Tensor | None,
    top: Tensor | None,
    find: Callable[..., Top],
    method: Method,
    recent: Recent = NOTHING,
    both: Callable[..., list[Top]] | None = None,
) -> StabilityThreshold:
    """Return the threshold by a function that finds the top of an operator.

    Args:
        snapshot: the step.
        start: of the mode.
        top: of the Hessian's own top.
        find: takes the operator, a start, earlier values, and ``R^1/2`` where the operator has it.
        method: of the products.
        recent: earlier values.
        both: finds the tops of H and of ``R^1/2 H R^1/2`` by the same products; None finds one after the other.
    """
    rule = coming_rule(snapshot)
    constant, maximize = threshold_constant(rule), rule.sign < 0
    scales, decay = root_rates(snapshot, rule), decay_rates(snapshot, rule)
    root = scales if rule.lr else 1.0
    added = coupled_decay(snapshot)

    def preconditioned(start: Tensor | None) -> Top:
        values = [value * rule.lr for value in recent.modes]
        operator = preconditioned_hessian(snapshot, method=method, rule=rule, root=scales)
        return find(operator, start, values, root)

    scale: Tensor | float
    shift: Tensor | float
    is_shared = both is not None and _shares_products(snapshot, scales)
    if isinstance(scales, Tensor) or isinstance(decay, Tensor):
        if both is not None and is_shared:
            operator = hessian(snapshot, method=method, weight=scales, both=True)
            modes = [value * rule.lr for value in recent.modes]
            plain, steepest = both(operator, scales, Earlier(top, recent.tops), Earlier(start, modes))
        else:
            plain, steepest = find(hessian(snapshot, method=method), top, recent.tops), preconditioned(start)
        if maximize or isinstance(added, Tensor):
            decayed = find(decayed_hessian(snapshot, method=method), plain.vector, ()).value
        else:
            decayed = plain.value + added
        scale, shift = 1.0, 0.0
    else:
        rate = rates(snapshot, rule)
        plain = steepest = find(hessian(snapshot, method=method), top if maximize else start, recent.tops)
        if maximize:
            steepest = find(decayed_hessian(snapshot, method=method), start, recent.modes)
        scale, shift = rate, 0.0 if maximize else decay / rate if rate else added
        decayed = steepest.value + shift
    value = steepest.value + shift
    courant_error = _relative(steepest.error, value)
    if plain is steepest and shift == 0:
        courant_error = torch.full_like(courant_error, torch.nan)
    courant = scale * value / constant
    return StabilityThreshold(
        sharpness=plain.value,
        error=_relative(plain.error, plain.value),
        courant_error=courant_error,
        courant=courant,
        limit=decayed / courant,
        top=plain.vector,
        carried_top=plain.carried,
        products=steepest.products + (plain.products if plain is not steepest and not is_shared else 0),
        eigenvalue=(plain.value, _relative(plain.error, plain.value)) if plain is steepest else None,
        recent=recent.with_values(plain.early, steepest.early / (rule.lr if scale == 1.0 and rule.lr else 1.0)),
        **_mode(snapshot, rule, steepest, root, value),
    )


def _relative(error: Tensor, value: Tensor) -> Tensor:
    """Return an error relative to a value; 0 where both are 0."""
    return error / value.abs().clamp_min(torch.finfo(torch.float64).tiny)
