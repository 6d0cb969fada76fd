"""One step of each optimizer on one tensor: the derivatives of the formulas of ``torch.optim``, in closed form."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, singledispatch
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable

Group = dict[str, Any]
State = Mapping[str, Tensor]
#: A linear function of what a step starts from, number by number: its derivative by "theta", by the clipped gradient
#: "g", and by the tensors of the state; what is absent has none.
Linear = dict[str, float | Tensor]


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

    def ahead(self, t: float, steps: int, square: Tensor | None, prior: float = 0.0) -> Tensor:
        """Return the denominator ``steps`` later, if the mean of ``d^2`` is ``square``, or (None) its mean so far.

        ``nu_(t + n) = keep^n nu_t + share (1 + keep + ... + keep^(n - 1)) square``. The mean so far is that of t
        squares and, in a table, of ``prior`` others that are a factor of each row times one of each column, see
        `by_factors`.
        """
        if square is None:
            seen = self._terms(t)
            square = (self.nu - self.keep**t * self.begin).clamp_min_(0).div_(self.share * seen)
            if prior and square.ndim > 1:
                square = torch.lerp(square, by_factors(square), prior / (seen + prior))
        later = torch.add(self.keep**steps * self.nu, square, alpha=self.share * self._terms(steps))
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
        derivatives: ``(at, group, t) -> {"theta": ..., block: ...}``, of the parameters and the state after step t,
            counted from 1, by those before it. ``at`` holds "theta", "g" and the state; a tensor that does not exist
            yet is absent.
        second_moment: ``(d, state, group, t) -> Moment``, d the `descent` direction. None for SGD.
    """

    blocks: Callable[[Group], tuple[str, ...]]
    momentum: Callable[[Group], float]
    derivatives: Callable[[State, Group, float], dict[str, Linear]]
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
    kind: Any = type(optimizer)
    if _overrides_step(kind, kind.step):
        base = next(c for c in type(optimizer).__mro__ if c in _SUPPORTED)
        raise Unmeasurable(
            f"{type(optimizer).__name__} overrides {base.__name__}.step: its update is not supported, and its sharp "
            "mode, edge of stability and critical rate are skipped"
        )
    return rule


@lru_cache(maxsize=32)
def _overrides_step(kind: Any, step: Any) -> bool:
    """Return whether a class makes another step than the class of ours that it derives from."""
    base: Any = next(c for c in kind.__mro__ if c in _SUPPORTED)
    # torch wraps the step of each class when it is first used.
    return inspect.unwrap(step) is not inspect.unwrap(base.step)


def descent(theta: Tensor, g: Tensor, group: Group) -> Tensor:
    """Return the direction that the optimizer descends: ``sign g + wd theta``; decoupled decay is not part of it."""
    g = -g if group["maximize"] else g
    return g if decoupled(group) or not group["weight_decay"] else g + float(group["weight_decay"]) * theta


def decoupled(group: Group) -> bool:
    """Return whether the weight decay acts on the parameters themselves, as in AdamW."""
    return bool(group.get("decoupled_weight_decay", False))


def root(nu: Tensor) -> Tensor:
    """Return the square root of a second moment, and 0 where rounding has made it negative."""
    return nu.clamp_min(0.0).sqrt_()


def by_factors(square: Tensor) -> Tensor:
    """Return ``r_i c_j / mean``, r and c the means of the rows and of the columns of a table.

    Squares of the gradients of a linear layer are such products in each sample. Source: Shazeer & Stern 2018.
    """
    table = square.flatten(1)
    rows, columns = table.mean(1, keepdim=True), table.mean(0)
    return (rows * (columns / columns.mean().clamp_min(torch.finfo(square.dtype).tiny))).view_as(square)


def averaged(before: Tensor | None, d: Tensor, keep: float) -> Tensor:
    """Return the running mean of squares, ``keep nu + (1 - keep) d^2``."""
    if before is None:
        return (1 - keep) * d * d
    return torch.mul(before, keep).addcmul_(d, d, value=1 - keep)


def combined(*terms: tuple[float | Tensor, Linear]) -> Linear:
    """Return the sum of linear functions, each times a factor, without the derivatives that are the number 0."""
    total: Linear = {}
    for factor, form in terms:
        for name, derivative in form.items():
            term = factor if isinstance(derivative, float) and derivative == 1 else factor * derivative
            total[name] = total[name] + term if name in total else term
    return {name: value for name, value in total.items() if isinstance(value, Tensor) or value != 0}


def _itself(name: str) -> Linear:
    return {name: 1.0}


def _by_descent(group: Group) -> Linear:
    """Return the derivative of the `descent` direction."""
    decay = 0.0 if decoupled(group) else float(group["weight_decay"])
    return combined((-1.0 if group["maximize"] else 1.0, _itself("g")), (decay, _itself("theta")))


def _descent_at(at: State, group: Group) -> Tensor:
    coupled = group["weight_decay"] and not decoupled(group)
    return descent(at["theta"] if coupled else at["g"], at["g"], group)


def slope_of_root(nu: Tensor) -> Tensor:
    """Return the derivative of `root`, and 0 at 0 instead of infinity.

    At 0 the gradient has always vanished, and to first order nu, being its square, does not change.
    """
    return reciprocal(root(nu)).mul_(0.5)


def reciprocal(size: Tensor) -> Tensor:
    """Return one over numbers that are not negative, and 0 where they are 0 (or so small that it would overflow).

    A NaN stays one. Several times faster than a choice by mask.
    """
    return size.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)


def _sgd(at: State, group: Group, t: float) -> dict[str, Linear]:
    d, beta, lr = _by_descent(group), float(group["momentum"]), float(group["lr"])
    if not beta:
        return {"theta": combined((1.0, _itself("theta")), (-lr, d))}
    m = d  # the first buffer is the gradient itself, without dampening
    if "momentum_buffer" in at:
        m = combined((beta, _itself("momentum_buffer")), (1 - float(group["dampening"]), d))
    update = combined((1.0, d), (beta, m)) if group["nesterov"] else m
    return {"theta": combined((1.0, _itself("theta")), (-lr, update)), "momentum_buffer": m}


def _mean(before: Tensor | None, d: Tensor, keep: float) -> Tensor:
    """Return the running mean ``keep mean + (1 - keep) d``, a new tensor."""
    mean = (1 - keep) * d
    return mean if before is None else mean.add_(before, alpha=keep)


def _adam_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    beta, eps = float(group["betas"][1]), float(group["eps"])
    nu = averaged(state.get("exp_avg_sq"), d, beta)
    floor: float | Tensor = 0.0
    if group["amsgrad"]:
        floor = state["max_exp_avg_sq"] if "max_exp_avg_sq" in state else torch.zeros_like(d)
    return Moment(nu, beta, 1 - beta, lambda nu, t, steps: root(nu).div_((1 - beta**t) ** 0.5).add_(eps), floor=floor)


def _adam(at: State, group: Group, t: float) -> dict[str, Linear]:
    value, d, beta, lr = _descent_at(at, group), _by_descent(group), float(group["betas"][0]), float(group["lr"])
    moment = _adam_moment(value, at, group, t)
    mean = _mean(at.get("exp_avg"), value, beta)
    new = {
        "exp_avg": combined((beta, _itself("exp_avg")), (1 - beta, d)),
        "exp_avg_sq": combined((moment.keep, _itself("exp_avg_sq")), (2 * moment.share * value, d)),
    }
    nu, by_nu = moment.nu, new["exp_avg_sq"]
    if isinstance(moment.floor, Tensor):
        before = (moment.floor > nu).to(nu) + 0.5 * (moment.floor == nu).to(nu)
        by_nu = combined((before, _itself("max_exp_avg_sq")), (1 - before, by_nu))
        nu, new["max_exp_avg_sq"] = torch.maximum(moment.floor, nu), by_nu
    divided = moment.denominator(nu, t, 0).reciprocal_()
    kept, rate = 1 - lr * float(group["weight_decay"]) if decoupled(group) else 1.0, lr / (1 - beta**t)
    # The update itself comes first: what divides by two more gradients leaves float32 where it begins far from 1.
    by_root = mean.mul_(divided).mul_(rate / (1 - moment.keep**t) ** 0.5).mul_(divided).mul_(slope_of_root(nu))
    divided.mul_(rate)
    theta = combined(
        (kept, _itself("theta")), (-1.0, {k: divided * v for k, v in new["exp_avg"].items()}), (by_root, by_nu)
    )
    return {"theta": theta} | new


def _rmsprop_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    alpha, eps = float(group["alpha"]), float(group["eps"])
    nu = averaged(state.get("square_avg"), d, alpha)
    if not group["centered"]:
        return Moment(nu, alpha, 1 - alpha, lambda nu, t, steps: root(nu).add_(eps))
    mean = _mean(state.get("grad_avg"), d, alpha)

    def denominator(nu: Tensor, t: float, steps: int) -> Tensor:
        later = alpha**steps * mean + (1 - alpha**steps) * d if steps else mean
        return root(nu - later * later) + eps

    return Moment(nu, alpha, 1 - alpha, denominator)


def _rmsprop(at: State, group: Group, t: float) -> dict[str, Linear]:
    value, d, beta, alpha = _descent_at(at, group), _by_descent(group), float(group["momentum"]), float(group["alpha"])
    moment = _rmsprop_moment(value, at, group, t)
    new = {"square_avg": combined((alpha, _itself("square_avg")), (2 * (1 - alpha) * value, d))}
    spread, by_spread = moment.nu, new["square_avg"]
    if group["centered"]:
        new["grad_avg"] = combined((alpha, _itself("grad_avg")), (1 - alpha, d))
        mean = _mean(at.get("grad_avg"), value, alpha)
        spread, by_spread = spread - mean * mean, combined((1.0, by_spread), (-2 * mean, new["grad_avg"]))
    divisor = moment.now(t)
    update = combined((1 / divisor, d), (-value / divisor / divisor * slope_of_root(spread), by_spread))
    if beta > 0:
        update = new["momentum_buffer"] = combined((beta, _itself("momentum_buffer")), (1.0, update))
    return {"theta": combined((1.0, _itself("theta")), (-float(group["lr"]), update))} | new


def _adagrad_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    eps, begin = float(group["eps"]), float(group["initial_accumulator_value"])
    return Moment(state["sum"] + d * d, 1.0, 1.0, lambda nu, t, steps: root(nu) + eps, begin=begin)


def _adagrad(at: State, group: Group, t: float) -> dict[str, Linear]:
    value, d = _descent_at(at, group), _by_descent(group)
    moment = _adagrad_moment(value, at, group, t)
    rate, divisor = float(group["lr"]) / (1 + (t - 1) * float(group["lr_decay"])), moment.now(t)
    total = combined((1.0, _itself("sum")), (2 * value, d))
    by_total = rate * value / divisor / divisor * slope_of_root(moment.nu)
    return {"theta": combined((1.0, _itself("theta")), (-rate / divisor, d), (by_total, total)), "sum": total}


def _registered(kind: type, rule: Formula) -> type:
    formula_of.register(kind, lambda optimizer: rule)
    return kind


_SUPPORTED = (
    _registered(
        torch.optim.SGD,
        Formula(
            blocks=lambda group: ("momentum_buffer",) if group["momentum"] else (),
            momentum=lambda group: float(group["momentum"]),
            derivatives=_sgd,
        ),
    ),
    _registered(
        torch.optim.Adam,
        Formula(
            blocks=lambda group: ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())),
            momentum=lambda group: float(group["betas"][0]),
            derivatives=_adam,
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
            derivatives=_rmsprop,
            second_moment=_rmsprop_moment,
        ),
    ),
    _registered(
        torch.optim.Adagrad,
        Formula(
            blocks=lambda group: ("sum",),
            momentum=lambda group: 0.0,
            derivatives=_adagrad,
            second_moment=_adagrad_moment,
        ),
    ),
)
