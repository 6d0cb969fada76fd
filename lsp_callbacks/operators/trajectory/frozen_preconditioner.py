"""One step of an optimizer whose preconditioner is held fixed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.spread_tensors import local
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.hessian import Method, hessian, per_parameter
from lsp_callbacks.operators.trajectory.optimizer_input import held_mask
from lsp_callbacks.operators.trajectory.spread_step import clip_factor, spread_step
from lsp_callbacks.operators.trajectory.update_rules import (
    Formula,
    Group,
    ParameterStep,
    decoupled,
    descent,
    rule_with_edge,
)
from lsp_callbacks.step.flat import flatten, split
from lsp_callbacks.step.snapshot import Snapshot, computed_once

Scale = dict[str, float | Tensor]


@dataclass(frozen=True, kw_only=True)
class StepConstants:
    """The numbers of a `FrozenRule`, without its diagonals.

    Attributes:
        lr: the largest rate of the groups.
        momentum: beta, or Adam's beta1.
        dampening: tau; beta1 for Adam, which averages.
        nesterov: whether the update is ``d + beta m+`` instead of ``m+``.
        decoupled_decay: wd' of each parameter, as in AdamW, times its relative rate.
        correction: c, Adam's bias correction ``1 - beta1^t``.
        direct: a, what a step takes of the gradient itself beside the momentum: that of NAdam; 0 elsewhere.
        sign: of ``grad L``: -1 under ``maximize``.
        frozen: whether D is a preconditioner held fixed.
    """

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    decoupled_decay: dict[str, float]
    correction: float = 1.0
    direct: float = 0.0
    sign: float = 1.0
    frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class FrozenRule(StepConstants):
    """``m+ = beta m + (1 - tau) d``, ``theta+ = (1 - lr wd') theta - (lr / c) D (m+ + a d)``, d the descent direction.

    One step of an optimizer whose preconditioner D is held fixed: SGD (D is 1), Adam and AdamW, NAdam, RAdam, Adamax,
    RMSprop and Adagrad; ``d = kappa grad L + wd theta``. Freezing D drops its dependence on the gradient. D and c are
    those of this step (`frozen_rule`) or, for a statement about the following steps, those that the optimizer will have
    some steps later (`coming_rule`).
    Clipping is held fixed at the factor kappa of this step: one number for clipping by norm; by value 0 for clipped
    coordinates, 1 elsewhere. RMSprop applies its momentum after the preconditioner, which is the same linear map with
    ``D m`` in its buffer.

    Attributes:
        scale: the diagonal of ``kappa D`` times each parameter's rate relative to ``lr``; 0 where nothing moves.
        weight_decay: wd of each parameter, coupled, times the diagonal of D and its relative rate.
        buffer_scale: how far a unit of the momentum buffer moves each parameter, in units of ``lr / c``.
    """

    scale: Scale
    weight_decay: Scale
    buffer_scale: Scale


@dataclass(frozen=True)
class _Steps:
    """The rule of a step, what that of each parameter is made from, by name, and each rate relative to the largest."""

    rule: Formula
    states: dict[str, Any]
    counts: dict[str, float]
    each: dict[str, ParameterStep]
    relative: dict[str, float]
    constants: StepConstants


def step_constants(snapshot: Snapshot) -> StepConstants:
    """Return the numbers of the step's rule: no vector over the parameters is made.

    Raises:
        Unmeasurable: see `frozen_rule`.
    """
    return _steps_ahead(snapshot.unsplit, 0).constants


@computed_once
def _steps_ahead(snapshot: Snapshot, steps: int) -> _Steps:
    optimizer, groups = snapshot.require_optimizer(), snapshot.groups
    rule = rule_with_edge(optimizer)
    momentum, dampening, nesterov, maximize = _common(rule, optimizer)
    lr, relative = _relative(optimizer, snapshot)
    states = {name: optimizer.state.get(p, {}) for name, p in snapshot.parameters.items()}
    counts = {name: float(state.get("step", 0)) + 1 for name, state in states.items()}
    each = _steps_of(rule, groups, states, counts, steps)
    constants = StepConstants(
        lr=lr,
        momentum=momentum,
        dampening=dampening if momentum else 0.0,
        nesterov=nesterov,
        decoupled_decay={name: relative[name] * each[name].decoupled_decay if name in each else 0.0 for name in groups},
        # Adam's bias correction of the momentum; parameters that joined later have another one.
        correction=max([of_one.correction for of_one in each.values()], default=1.0),
        # Larger for parameters that joined later. For the others stability errs on the early side, while these shares
        # come together.
        direct=max([of_one.direct for of_one in each.values()], default=0.0),
        sign=-1.0 if maximize else 1.0,
        frozen=rule.second_moment is not None,
    )
    return _Steps(rule, states, counts, each, relative, constants)


@computed_once
def frozen_rule(snapshot: Snapshot) -> FrozenRule:
    """Return the rule of the step's optimizer, with its preconditioner and clipping held fixed as in this step.

    Args:
        snapshot: a step with its optimizer, before the update.

    Raises:
        Unmeasurable: no optimizer, one that is not supported, or groups with different momentum.

    Cost: no gradient. Computed once a step.
    """
    return (
        rule_ahead(snapshot) if snapshot.held is None else rule_of_shards(snapshot, frozen_rule(spread_step(snapshot)))
    )


def rule_of_shards(snapshot: Snapshot, rule: FrozenRule) -> FrozenRule:
    """Return the part of a rule that belongs to the shards of this process.

    Args:
        snapshot: a step with shards.
        rule: that of its `spread_step`, whose gradients are clipped already.
    """
    factor = clip_factor(snapshot)

    def of_this_process(values: Scale, factor: float = 1.0) -> Scale:
        parts = {name: local(x) if isinstance(x, Tensor) else x for name, x in values.items()}
        return parts if factor == 1 else {name: factor * x for name, x in parts.items()}

    return replace(
        rule,
        scale=of_this_process(rule.scale, factor),
        weight_decay=of_this_process(rule.weight_decay),
        buffer_scale=of_this_process(rule.buffer_scale),
    )


def rule_ahead(
    snapshot: Snapshot, steps: int = 0, squares: dict[str, Tensor] | None = None, *, prior: float = 0.0
) -> FrozenRule:
    """Return the rule ``steps`` later, if the gradients in between have the given mean ``squares``.

    Args:
        snapshot: a step with its optimizer, before the update.
        steps: 0 is the rule of this step.
        squares: of unclipped gradients, by parameter; a missing parameter continues with its mean square so far.
        prior: how many gradients that mean is drawn by to what rows and columns have in common, see `Moment.ahead`.

    Raises:
        Unmeasurable: see `frozen_rule`.
    """
    ahead, groups = _steps_ahead(snapshot, steps), snapshot.groups
    rule, states, counts, each, relative = ahead.rule, ahead.states, ahead.counts, ahead.each, ahead.relative
    correction, factors = ahead.constants.correction, _clip_factors(snapshot)
    scale: Scale = dict.fromkeys(groups, 0.0)
    decay: Scale = dict.fromkeys(groups, 0.0)
    buffer: Scale = dict.fromkeys(groups, 0.0)
    for name, p in snapshot.parameters.items():
        group, g = groups[name], None if snapshot.gradient is None else snapshot.gradient[name]
        if group is None or (snapshot.gradient is not None and g is None):
            continue
        past = counts[name] + steps - 1
        rate = relative[name] * correction / each[name].correction / (1 + past * float(group.get("lr_decay", 0.0)))
        inner: float | Tensor = 1.0
        factor = factors.get(name, 1.0)
        if rule.second_moment is not None:
            if g is None:  # before training there is no gradient
                continue
            g = _clipped(snapshot, g, factor)
            d = descent(p.detach(), g, group)
            moment = rule.second_moment(d, states[name], group, counts[name])
            square = None
            if squares is not None and name in squares:  # d has the mean of g, and coupled decay that is in d only
                square = d * d + (_clipped(snapshot, squares[name].sqrt(), factor).square() - g * g)
            divisor = moment.ahead(counts[name], steps, square, prior) if steps else moment.now(counts[name])
            inner = divisor.reciprocal_()
        moves = inner if rate == 1.0 else inner * rate
        scale[name] = moves if isinstance(factor, float) and factor == 1.0 else factor * moves
        if group["weight_decay"] and not decoupled(group):
            decay[name] = float(group["weight_decay"]) * moves
        buffer[name] = rate if isinstance(snapshot.optimizer, torch.optim.RMSprop) else moves
    return FrozenRule(**vars(ahead.constants), scale=scale, weight_decay=decay, buffer_scale=buffer)


def _steps_of(
    rule: Formula, groups: dict[str, Group | None], states: dict[str, Any], counts: dict[str, float], steps: int
) -> dict[str, ParameterStep]:
    """Return what each parameter's step is, by name; computed once for all that share options, age and state."""
    each: dict[str, ParameterStep] = {}
    steps_by_key: dict[Any, ParameterStep] = {}
    for name, group in groups.items():
        if group is not None:
            state = states[name]
            key = (id(group), counts[name], *[float(state[number]) for number in rule.numbers if number in state])
            if key not in steps_by_key:
                steps_by_key[key] = rule.step_of(group, state, counts[name] + steps)
            each[name] = steps_by_key[key]
    return each


def _common(rule: Formula, optimizer: torch.optim.Optimizer) -> tuple[float, float, bool, bool]:
    betas = {
        (
            beta := float(rule.momentum(group)),
            beta if rule.averages else float(group.get("dampening", 0.0)),
            bool(group.get("nesterov", False)),
            bool(group.get("maximize", False)),
        )
        for group in optimizer.param_groups
    }
    if len(betas) > 1:
        raise Unmeasurable(
            "parameter groups with different momentum, dampening, nesterov or maximize have no common edge of "
            "stability and no common critical rate: give all groups the same, or leave out what compares with an "
            "edge"
        )
    return betas.pop()


def _relative(optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> tuple[float, dict[str, float]]:
    """Return the largest rate, and each parameter's relative to it, by ``initial_lr`` where a warm-up begins at 0."""
    groups = optimizer.param_groups
    key = "lr" if any(float(g["lr"]) for g in groups) else "initial_lr"
    rates = {id(p): float(g.get(key, 1.0)) for g in groups for p in g["params"]}
    top = max(rates.values()) or 1.0
    relative = {name: rates.get(id(p), 0.0) / top for name, p in snapshot.parameters.items()}
    return max(float(g["lr"]) for g in groups), relative


def _clip_factors(snapshot: Snapshot) -> Scale:
    """Return the factor kappa of each parameter; empty where nothing is clipped."""
    if snapshot.clipping is None or snapshot.flat_gradient is None:
        return {}
    if snapshot.held is not None:
        return dict.fromkeys(snapshot.parameters, clip_factor(snapshot))
    gradient = snapshot.flat_gradient
    held = held_mask(snapshot)
    factor = snapshot.clipping.factor(gradient if held is None else held * gradient)
    if factor.ndim == 0:
        return dict.fromkeys(snapshot.parameters, float(factor))
    return dict(zip(snapshot.parameters, split(factor, list(snapshot.parameters.values()))))


def _clipped(snapshot: Snapshot, g: Tensor, factor: float | Tensor) -> Tensor:
    clipping = snapshot.clipping
    g = g.detach()
    if clipping is None:
        return g
    return clipping(g) if clipping.kind == "value" else factor * g


def spread(values: Scale, snapshot: Snapshot) -> Tensor | float:
    """Return a number or tensor for each trainable parameter as one flat vector; a float where all are equal numbers.

    A parameter without a gradient has no curvature either: its value is ignored.
    """
    names = [n for n in values if snapshot.gradient is None or snapshot.gradient[n] is not None] or list(values)
    if all(isinstance(values[name], float) and values[name] == values[names[0]] for name in names):
        return values[names[0]]
    parameters = list(snapshot.parameters.values())
    full = [torch.as_tensor(x, dtype=p.dtype, device=p.device) for x, p in zip(values.values(), parameters)]
    return flatten([x.expand_as(p) for x, p in zip(full, parameters)], parameters)


def rates(snapshot: Snapshot, rule: FrozenRule | None = None) -> Tensor | float:
    """Return ``R = kappa lr D / c``, flat: how far each parameter moves for a unit of its gradient, averaging aside.

    Args:
        snapshot: a step with its optimizer.
        rule: None takes the `frozen_rule` of the step.

    Raises:
        Unmeasurable: where they depend on a gradient that the snapshot does not have.
    """
    rule = rule or frozen_rule(snapshot)
    require_gradient(snapshot)
    return rule.lr / rule.correction * spread(rule.scale, snapshot)


def require_gradient(snapshot: Snapshot) -> None:
    """Raise an error if preconditioner or clip factor depend on a gradient that the snapshot does not have.

    Raises:
        Unmeasurable: if so.
    """
    if snapshot.gradient is None and (step_constants(snapshot).frozen or snapshot.clipping is not None):
        raise Unmeasurable(
            "the preconditioner and the clipping of a step depend on its gradient: pass gradient=... to the Snapshot"
        )


def decay_rates(snapshot: Snapshot, rule: FrozenRule | None = None) -> Tensor | float:
    """Return ``lr D wd / c``, the coupled decay in the units of `rates`; flat."""
    rule = rule or frozen_rule(snapshot)
    return rule.lr / rule.correction * spread(rule.weight_decay, snapshot)


def buffer_rates(snapshot: Snapshot, rule: FrozenRule | None = None) -> Tensor | float:
    """Return how far each parameter moves for a unit of its momentum buffer; flat."""
    rule = rule or frozen_rule(snapshot)
    return rule.lr / rule.correction * spread(rule.buffer_scale, snapshot)


def coupled_decay(snapshot: Snapshot) -> Tensor | float:
    """Return the coupled decay wd of each parameter, divided by its clip factor; 0 for decoupled decay; flat."""
    optimizer = snapshot.optimizer
    if optimizer is not None and not any(group["weight_decay"] for group in optimizer.param_groups):
        return 0.0
    factors = _clip_factors(snapshot)
    values = []
    for name, group in snapshot.groups.items():
        factor = factors.get(name, 1.0)
        divisor = factor if isinstance(factor, float) and factor > 0 else 1.0
        values.append(0.0 if group is None or decoupled(group) else float(group["weight_decay"]) / divisor)
    return per_parameter(values, snapshot)


def decayed_hessian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """Return ``H' = sign H + wd``: the derivative of the descent direction, coupled weight decay included.

    Under clipping by norm wd is divided by kappa, as it is added after the clipping.
    """
    H, sign, decay = hessian(snapshot, method=method), step_constants(snapshot).sign, coupled_decay(snapshot)

    def product(v: Tensor) -> Tensor:
        return sign * (H @ v) + decay * v

    return replace(H, apply=product, adjoint=product, matrix=None)


def root_rates(snapshot: Snapshot, rule: FrozenRule | None = None) -> Tensor | float:
    """Return ``R^(1/2)``, see `rates`."""
    rate = rates(snapshot, rule)
    return rate.sqrt_() if isinstance(rate, Tensor) else rate**0.5


def preconditioned_hessian(
    snapshot: Snapshot,
    *,
    method: Method = "auto",
    rule: FrozenRule | None = None,
    root: Tensor | float | None = None,
) -> LinearOperator:
    """Return ``R^(1/2) H' R^(1/2)`` with R the effective `rates`: symmetric, with the eigenvalues of ``R H'``.

    Args:
        snapshot: a step with its optimizer.
        method: of the Hessian products.
        rule: None takes the `frozen_rule` of the step.
        root: its `root_rates`, where they are at hand.
    """
    sign, decay = step_constants(snapshot).sign, decay_rates(snapshot, rule)
    scale = root_rates(snapshot, rule) if root is None else root
    H = hessian(snapshot, method=method, weight=scale)

    def product(v: Tensor) -> Tensor:
        image = H @ (scale * v)  # which the operator may still compare with the next: it is not overwritten
        image = (scale * image).mul_(sign)
        return image if isinstance(decay, float) and not decay else image.add_(decay * v)

    return replace(H, apply=product, adjoint=product, matrix=None)
