"""One step of each optimizer on one tensor: the formulas of ``torch.optim`` as pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable

Group = dict[str, Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """The second moment that divides a gradient: ``denominator(nu, t)`` in step t, with ``nu+ = keep nu + share d^2``.

    Attributes:
        nu: after step t.
        keep: the factor of nu in a step; 1 for a sum.
        share: the factor of ``d^2``.
        begin: nu before the first step.
        denominator: ``(nu, t, steps)``; of a centered one, the running mean is continued ``steps`` further.
        floor: nu is at least this: the largest so far, for amsgrad; 0 elsewhere.
    """

    nu: Tensor
    keep: float
    share: float
    denominator: Callable[[Tensor, float, int], Tensor]
    begin: float = 0.0
    floor: float | Tensor = 0.0

    def now(self, t: float) -> Tensor:
        """Return the denominator of this step's gradient."""
        return self.denominator(self._least(self.nu), t, 0)

    def ahead(self, t: float, steps: int, square: Tensor | None) -> Tensor:
        """Return the denominator ``steps`` later, if the mean of ``d^2`` is ``square``, or (None) its mean so far.

        ``nu_(t + n) = keep^n nu_t + share (1 + keep + ... + keep^(n - 1)) square``.
        """
        if square is None:
            square = (self.nu - self.keep**t * self.begin).clamp_min(0) / (self.share * self._terms(t))
        later = self.keep**steps * self.nu + self.share * self._terms(steps) * square
        return self.denominator(self._least(torch.maximum(self.nu, later) if self._grows else later), t + steps, steps)

    @property
    def _grows(self) -> bool:
        return isinstance(self.floor, Tensor)

    def _least(self, nu: Tensor) -> Tensor:
        return torch.maximum(nu, self.floor) if isinstance(self.floor, Tensor) else nu

    def _terms(self, n: float) -> float:
        return float(n) if self.keep == 1 else (1 - self.keep**n) / (1 - self.keep)


@dataclass(frozen=True)
class Formula:
    """One optimizer without couplings: each number of a parameter moves by itself.

    Attributes:
        blocks: from a parameter group's options to the names of its state tensors; a momentum buffer comes first.
        momentum: from the options to beta of that buffer; 0 where the first block is no momentum.
        step: ``(theta, g, state, group, t) -> (theta', state')``, t counted from 1. A tensor that does not exist yet is
            absent from ``state``.
        second_moment: ``(d, state, group, t) -> Moment``, d the `descent` direction. None for SGD.
    """

    blocks: Callable[[Group], tuple[str, ...]]
    momentum: Callable[[Group], float]
    step: Callable[[Tensor, Tensor, State, Group, float], tuple[Tensor, State]]
    second_moment: Callable[[Tensor, State, Group, float], Moment] | None = None


@singledispatch
def formula_of(optimizer: torch.optim.Optimizer) -> Formula | None:
    """Return the formula of an optimizer, by its type; None where none is implemented."""
    return None


def formula(optimizer: torch.optim.Optimizer) -> Formula:
    """Return the formula of an optimizer.

    Raises:
        Unmeasurable: if its step is not implemented, or a subclass overrides it.
    """
    rule = formula_of(optimizer)
    if rule is None:
        raise Unmeasurable(
            f"the update of {type(optimizer).__name__} is not supported (those of torch.optim.SGD, Adam, AdamW, "
            "RMSprop and Adagrad are): its sharp mode, edge of stability and critical rate are skipped"
        )
    base: Any = next(c for c in type(optimizer).__mro__ if c in _SUPPORTED)
    # torch wraps the step of each class when it is first used.
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(base.step):
        raise Unmeasurable(
            f"{type(optimizer).__name__} overrides {base.__name__}.step: its update is not supported, and its sharp "
            "mode, edge of stability and critical rate are skipped"
        )
    return rule


def descent(theta: Tensor, g: Tensor, group: Group) -> Tensor:
    """Return the direction that the optimizer descends: ``sign g + wd theta``; decoupled decay is not part of it."""
    g = -g if group["maximize"] else g
    return g if decoupled(group) or not group["weight_decay"] else g + float(group["weight_decay"]) * theta


def decoupled(group: Group) -> bool:
    """Return whether the weight decay acts on the parameters themselves, as in AdamW."""
    return bool(group.get("decoupled_weight_decay", False))


def root(nu: Tensor) -> Tensor:
    """Return the square root, with the derivative 0 at 0 instead of infinity.

    At 0 the gradient has always vanished, and to first order nu, being its square, does not change.
    """
    positive = nu > 0  # however small: eps may be smaller still
    return torch.where(positive, torch.where(positive, nu, 1.0).sqrt(), 0.0)


def _sgd(theta: Tensor, g: Tensor, state: State, group: Group, t: float) -> tuple[Tensor, State]:
    d, beta, lr = descent(theta, g, group), float(group["momentum"]), float(group["lr"])
    if not beta:
        return theta - lr * d, {}
    # The first buffer is the gradient itself, without dampening.
    m = beta * state["momentum_buffer"] + (1 - float(group["dampening"])) * d if state else d
    return theta - lr * (d + beta * m if group["nesterov"] else m), {"momentum_buffer": m}


def _adam_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    beta, eps = float(group["betas"][1]), float(group["eps"])
    nu = beta * state.get("exp_avg_sq", torch.zeros_like(d)) + (1 - beta) * d * d
    floor = state.get("max_exp_avg_sq", torch.zeros_like(d)) if group["amsgrad"] else 0.0
    return Moment(nu, beta, 1 - beta, lambda nu, t, steps: root(nu) / (1 - beta**t) ** 0.5 + eps, floor=floor)


def _adam(theta: Tensor, g: Tensor, state: State, group: Group, t: float) -> tuple[Tensor, State]:
    d, beta, lr = descent(theta, g, group), float(group["betas"][0]), float(group["lr"])
    moment = _adam_moment(d, state, group, t)
    new = {"exp_avg": beta * state.get("exp_avg", torch.zeros_like(d)) + (1 - beta) * d, "exp_avg_sq": moment.nu}
    if group["amsgrad"]:
        new["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(moment.nu)), moment.nu)
    if decoupled(group):
        theta = (1 - lr * float(group["weight_decay"])) * theta
    return theta - lr / (1 - beta**t) * new["exp_avg"] / moment.now(t), new


def _rmsprop_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    alpha, eps = float(group["alpha"]), float(group["eps"])
    nu = alpha * state.get("square_avg", torch.zeros_like(d)) + (1 - alpha) * d * d
    if not group["centered"]:
        return Moment(nu, alpha, 1 - alpha, lambda nu, t, steps: root(nu) + eps)
    mean = alpha * state.get("grad_avg", torch.zeros_like(d)) + (1 - alpha) * d

    def denominator(nu: Tensor, t: float, steps: int) -> Tensor:
        later = alpha**steps * mean + (1 - alpha**steps) * d if steps else mean
        return root(nu - later * later) + eps

    return Moment(nu, alpha, 1 - alpha, denominator)


def _rmsprop(theta: Tensor, g: Tensor, state: State, group: Group, t: float) -> tuple[Tensor, State]:
    d, beta, alpha = descent(theta, g, group), float(group["momentum"]), float(group["alpha"])
    moment = _rmsprop_moment(d, state, group, t)
    new = {"square_avg": moment.nu}
    if group["centered"]:
        new["grad_avg"] = alpha * state.get("grad_avg", torch.zeros_like(d)) + (1 - alpha) * d
    update = d / moment.now(t)
    if beta > 0:
        update = new["momentum_buffer"] = beta * state.get("momentum_buffer", torch.zeros_like(d)) + update
    return theta - float(group["lr"]) * update, new


def _adagrad_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    eps, begin = float(group["eps"]), float(group["initial_accumulator_value"])
    return Moment(state["sum"] + d * d, 1.0, 1.0, lambda nu, t, steps: root(nu) + eps, begin=begin)


def _adagrad(theta: Tensor, g: Tensor, state: State, group: Group, t: float) -> tuple[Tensor, State]:
    d = descent(theta, g, group)
    moment = _adagrad_moment(d, state, group, t)
    rate = float(group["lr"]) / (1 + (t - 1) * float(group["lr_decay"]))
    return theta - rate * d / moment.now(t), {"sum": moment.nu}


def _registered(kind: type, rule: Formula) -> type:
    formula_of.register(kind, lambda optimizer: rule)
    return kind


_SUPPORTED = (
    _registered(
        torch.optim.SGD,
        Formula(
            blocks=lambda group: ("momentum_buffer",) if group["momentum"] else (),
            momentum=lambda group: float(group["momentum"]),
            step=_sgd,
        ),
    ),
    _registered(
        torch.optim.Adam,
        Formula(
            blocks=lambda group: ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())),
            momentum=lambda group: float(group["betas"][0]),
            step=_adam,
            second_moment=_adam_moment,
        ),
    ),
    _registered(
        torch.optim.RMSprop,
        Formula(
            blocks=lambda group: (
                *(("momentum_buffer",) if group["momentum"] > 0 else ()),
                "square_avg",
                *(("grad_avg",) if group["centered"] else ()),
            ),
            momentum=lambda group: float(group["momentum"]),
            step=_rmsprop,
            second_moment=_rmsprop_moment,
        ),
    ),
    _registered(
        torch.optim.Adagrad,
        Formula(
            blocks=lambda group: ("sum",), momentum=lambda group: 0.0, step=_adagrad, second_moment=_adagrad_moment
        ),
    ),
)
