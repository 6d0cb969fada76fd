"""What is known of an optimizer whose update is implemented: its derivative, its preconditioner, its momentum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial, singledispatch
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable

Group = dict[str, Any]
State = Mapping[str, Tensor]
#: A linear function of what a step starts from, number by number: its derivative by "theta", by the clipped gradient
#: "g", and by the tensors of the state; what is absent has none.
#: Each is a number, a tensor, or a `Coupled` map.
Linear = dict[str, Any]


@dataclass(frozen=True)
class Coupled:
    """A linear map of the numbers of one parameter, flat, that is no diagonal.

    Attributes:
        forward: its product with a vector.
        backward: that of its transpose.
        size: by how much it typically stretches a vector.
        factor: of all of them.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    size: float
    factor: float = 1.0

    def push(self, vector: Tensor) -> Tensor:
        """Return the product with a vector."""
        return self.factor * self.forward(vector)

    def pull(self, vector: Tensor) -> Tensor:
        """Return the product of the transpose with a vector."""
        return self.factor * self.backward(vector)

    def __rmul__(self, factor: float) -> Coupled:
        """Return this map times a number."""
        return replace(self, factor=factor * self.factor)


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
        """Return the denominator of this step's gradient, a new tensor."""
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


class Divisor(Protocol):
    """What divides the momentum of a step, number by number: `Moment`, or one that is no mean of squares."""

    def now(self, t: float) -> Tensor:
        """Return the denominator of this step, a new tensor."""
        ...

    def ahead(self, t: float, steps: int, square: Tensor | None, prior: float = 0.0) -> Tensor:
        """Return the denominator ``steps`` later, see `Moment.ahead`, a new tensor."""
        ...


class ParameterStep(NamedTuple):
    """What the step of one parameter is made from beside its tensors, see `Formula`.

    Attributes:
        correction: c.
        direct: a.
        decoupled_decay: the weight decay that acts on the parameter itself; 0 where it is part of the gradient.
    """

    correction: float
    direct: float
    decoupled_decay: float


@dataclass(frozen=True)
class Formula:
    """The step of one optimizer: each number of a parameter moves by itself, or each parameter (``couples``).

    With ``m+ = beta m + (1 - tau) d`` a step is ``theta - (lr / c) D (m+ + a d)``, D the preconditioner.

    Attributes:
        blocks: from a parameter group's options to the names of its state tensors; a momentum buffer comes first.
        momentum: from the options to beta of that buffer; 0 where the first block is no momentum.
        derivatives: ``(at, group, t) -> {"theta": ..., block: ...}``, of the parameters and the state after step t,
            counted from 1, by those before it. ``at`` holds "theta", "g" and the state; a tensor that does not exist
            yet is absent.
        second_moment: ``(d, state, group, t) -> Divisor``, d the `descent` direction. None without a preconditioner.
        averages: whether the momentum is a mean, tau = beta.
        correction: ``(group, t) -> c``.
        direct: ``(group, t) -> a``; Nesterov's momentum of SGD is told by its option instead.
        numbers: names of the state's single numbers that the step reads beside its count; they are among the options
            that the other functions are given.
        couples: whether the numbers of a parameter move together: then ``at`` holds tensors of its shape.
        rounding: relative error of the real update, where torch computes it in less precision than the parameters have.
        no_edge: why no learning rate is the edge of stability of these steps; "" where there is one.
    """

    blocks: Callable[[Group], tuple[str, ...]]
    momentum: Callable[[Group], float]
    derivatives: Callable[[State, Group, float], dict[str, Linear]]
    second_moment: Callable[[Tensor, State, Group, float], Divisor] | None = None
    averages: bool = False
    correction: Callable[[Group, float], float] = lambda group, t: 1.0
    direct: Callable[[Group, float], float] = lambda group, t: 0.0
    numbers: tuple[str, ...] = ()
    couples: bool = False
    rounding: float = 0.0
    no_edge: str = ""

    def options(self, group: Group, state: Mapping[str, Any]) -> Group:
        """Return the options of a parameter, with the numbers of its state."""
        return group | {name: float(state[name]) for name in self.numbers if name in state}

    def step_of(self, group: Group, state: Mapping[str, Any], t: float) -> ParameterStep:
        """Return c and a of step t of a parameter, by its group's options and its state."""
        options = self.options(group, state)
        decay = float(group["weight_decay"]) if decoupled(group) else 0.0
        return ParameterStep(self.correction(options, t), self.direct(options, t), decay)


def first_beta(group: Group) -> float:
    """Return beta of Adam's running mean of gradients."""
    return float(group["betas"][0])


def bias_correction(group: Group, t: float) -> float:
    """Return Adam's ``1 - beta1^t``, which an average of t gradients lacks."""
    return 1 - first_beta(group) ** t


#: The `Formula` of an optimizer that moves by Adam's running mean.
like_adam = partial(Formula, momentum=first_beta, averages=True, correction=bias_correction)
#: The optimizers whose formulas are implemented; AdamW is an Adam.
_SUPPORTED: list[type] = []


@singledispatch
def formula_of(optimizer: torch.optim.Optimizer) -> Formula | None:
    """Return the formula of an optimizer, by its type; None where none is implemented."""
    return None


def register(kind: type, rule: Formula) -> None:
    """Take in the formula of an optimizer and of its subclasses."""
    formula_of.register(kind, lambda optimizer: rule)
    _SUPPORTED.append(kind)


def formula(optimizer: torch.optim.Optimizer) -> Formula:
    """Return the formula of an optimizer.

    Raises:
        Unmeasurable: if its step is not implemented, or a subclass overrides it.
    """
    rule = formula_of(optimizer)
    if rule is None:
        names = sorted((kind.__name__ for kind in _SUPPORTED), key=str.lower)
        raise Unmeasurable(
            f"the update of {type(optimizer).__name__} is not supported (those of torch.optim.{', '.join(names[:-1])} "
            f"and {names[-1]} are): its sharp mode, edge of stability and critical rate are skipped"
        )
    kind: Any = type(optimizer)
    if _overrides_step(kind, kind.step):
        base = next(c for c in type(optimizer).__mro__ if c in _SUPPORTED)
        raise Unmeasurable(
            f"{type(optimizer).__name__} overrides {base.__name__}.step: its update is not supported, and its sharp "
            "mode, edge of stability and critical rate are skipped"
        )
    return rule


def rule_with_edge(optimizer: torch.optim.Optimizer) -> Formula:
    """Return the formula of an optimizer whose steps become unstable beyond some learning rate.

    Raises:
        Unmeasurable: see `formula`; steps whose length does not depend on the size of the gradient.
    """
    rule = formula(optimizer)
    if rule.no_edge:
        raise Unmeasurable(rule.no_edge)
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
    mean = columns.mean()
    return (rows * torch.where(mean == 0, 0.0, columns / mean)).view_as(square)


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
            if isinstance(factor, float) and factor == 1:
                term = derivative
            else:
                term = factor if isinstance(derivative, float) and derivative == 1 else factor * derivative
            total[name] = total[name] + term if name in total else term
    return {name: value for name, value in total.items() if not isinstance(value, float | int) or value != 0}


def itself(name: str) -> Linear:
    """Return the derivative of a tensor by itself."""
    return {name: 1.0}


def by_descent(group: Group) -> Linear:
    """Return the derivative of the `descent` direction."""
    decay = 0.0 if decoupled(group) else float(group["weight_decay"])
    return combined((-1.0 if group["maximize"] else 1.0, itself("g")), (decay, itself("theta")))


def descent_at(at: State, group: Group) -> Tensor:
    """Return the `descent` direction of a step, by its parameters and its clipped gradient."""
    coupled = group["weight_decay"] and not decoupled(group)
    return descent(at["theta"] if coupled else at["g"], at["g"], group)


def slope_of_root(nu: Tensor) -> Tensor:
    """Return the derivative of `root`, and 0 at 0 instead of infinity.

    At 0 the gradient has always vanished, and to first order nu, being its square, does not change.
    """
    return root(nu).reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0).mul_(0.5)


def reciprocal(size: Tensor) -> Tensor:
    """Return one over numbers that are not negative, and 0 where they are 0 (or so small that it would overflow).

    A NaN stays one. Several times faster than a choice by mask.
    """
    return size.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)


def running_mean(before: Tensor | None, d: Tensor, keep: float) -> Tensor:
    """Return the running mean ``keep mean + (1 - keep) d``, a new tensor."""
    mean = (1 - keep) * d
    return mean if before is None else mean.add_(before, alpha=keep)
