"""Whether a schedule's rates fade as Robbins and Monro ask, by its form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

from lsp_callbacks.autograd._torch_internals import has_scale_function, parts_of

Exponent = float | None


@dataclass(frozen=True)
class PowerLaw:
    """``(1 + t / start)^-exponent``, for ``LambdaLR``: the schedules of Robbins and Monro for exponents in (1/2, 1].

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import PowerLaw, robbins_monro
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> robbins_monro(torch.optim.lr_scheduler.LambdaLR(sgd, PowerLaw(0.75, start=1000))).holds
        True
    """

    exponent: float
    start: float = 1.0

    def __call__(self, step: int) -> float:
        return (1 + step / self.start) ** -self.exponent


@dataclass(frozen=True)
class RobbinsMonro:
    """The decay of a schedule's rates, and what follows for ``sum lr_t`` and ``sum lr_t^2`` over infinitely many steps.

    Attributes:
        exponent: a where the rates fall like ``t^-a``, up to what stays within bounds: 0 does not fade, infinity fades
            faster than any power or ends at 0, minus infinity grows; None where it is unknown.
        holds: whether the first sum diverges and the second does not, ``1/2 < a <= 1``; None where a is unknown.
        reason: one sentence.
    """

    exponent: float | None
    holds: bool | None
    reason: str


def robbins_monro(*schedulers: Any) -> RobbinsMonro:
    """Return whether ``sum lr_t = infinity`` and ``sum lr_t^2 < infinity``, from the form of a schedule.

    No finite number of rates decides it, so nothing is computed from rates: each scheduler of torch has the form
    ``t^-a``. ``a = 0`` for what is constant in the end or goes round (StepLR with gamma 1, MultiStepLR, cyclic and
    restarting ones, warm-ups, an annealing that ends above 0), infinity for what decays geometrically or ends at 0
    (ExponentialLR, StepLR, PolynomialLR, cosine and linear to 0, OneCycleLR, which ends). Schedulers in a chain
    multiply, and their exponents add; of a sequence the last counts. Cosine annealing is read up to its ``T_max``, and
    beyond it torch's own rises again: neither passes. ``ReduceLROnPlateau`` never passes: it makes no reduction below
    ``eps``, so that the rate stays above 0. A ``LambdaLR`` is known where its function is a `PowerLaw` or one of those
    of transformers.

    Args:
        schedulers: that move one optimizer, together; none is a constant rate.

    Source: Robbins & Monro 1951; Katende 2025, Thm 5.3; docs/theory.md, section The law of SGD, energies, kinks.

    Example:
        >>> from lsp_callbacks.functional import robbins_monro
        >>> robbins_monro().reason
        'no: the rates do not fade, and the sum of their squares is infinite'
    """
    a = _product(_exponent(scheduler) for scheduler in schedulers)
    if a is None:
        names = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
        return RobbinsMonro(None, None, f"unknown: the form of {names} is not listed; see rate_decay")
    if a == math.inf:
        reason = "no: the rates end, or fade so fast that their sum is finite"
    elif a > 1:
        reason = f"no: the rates fall like t^-{a:g}, and their sum is finite"
    elif a > 0.5:
        reason = f"yes: the rates fall like t^-{a:g}"
    elif a > 0:
        reason = f"no: the rates fall like t^-{a:g}, and the sum of their squares is infinite"
    else:
        reason = f"no: the rates {'do not fade' if a == 0 else 'grow'}, and the sum of their squares is infinite"
    return RobbinsMonro(a, 0.5 < a <= 1, reason)


def _product(exponents: Iterable[Exponent]) -> Exponent:
    """Return the exponent of rates that multiply; one that ends or decays geometrically outweighs any power."""
    total = 0.0
    for exponent in exponents:
        if exponent is None:
            return None
        total += exponent
    return None if math.isnan(total) else total  # a geometric decay against a growth


def _exponent(scheduler: Any) -> Exponent:
    # Exactly these classes: what overrides one may do anything.
    form = _FORMS.get(type(scheduler))
    return None if form is None else form(scheduler)


def _geometric(gamma: float) -> float:
    if gamma == 1:
        return 0.0
    return math.inf if gamma < 1 else -math.inf


def _ends_at(value: float) -> float:
    return 0.0 if value > 0 else math.inf


def _cyclic(scheduler: Any) -> Exponent:
    least = min(scheduler.base_lrs)
    if scheduler.mode == "triangular" and not has_scale_function(scheduler):
        return 0.0 if max(*scheduler.max_lrs, *scheduler.base_lrs) > 0 else math.inf
    if has_scale_function(scheduler):
        return None
    # The swing fades geometrically, and leaves the base.
    return _ends_at(least) if scheduler.mode == "triangular2" or scheduler.gamma < 1 else _geometric(scheduler.gamma)


def _lambda(scheduler: Any) -> Exponent:
    exponents = {_known(function) for function in scheduler.lr_lambdas}
    return exponents.pop() if len(exponents) == 1 else None


def _known(function: Callable) -> Exponent:
    if isinstance(function, PowerLaw):
        return float(function.exponent)
    inner = getattr(function, "func", function)  # transformers makes partials
    if getattr(inner, "__module__", None) != "transformers.optimization":
        return None
    settings = getattr(function, "keywords", {})
    name = inner.__name__.removeprefix("_get_").split("_lambda")[0].removesuffix("_lr").removesuffix("_lr_rate")
    if name == "polynomial_decay_schedule_with_warmup":
        return _ends_at(settings.get("lr_end", 0.0))
    if settings.get("min_lr_rate"):
        return 0.0
    return _TRANSFORMERS.get(name)


_TRANSFORMERS: dict[str, float] = {
    "constant": 0.0,
    "constant_schedule_with_warmup": 0.0,
    "linear_schedule_with_warmup": math.inf,
    "cosine_schedule_with_warmup": math.inf,
    "cosine_with_hard_restarts_schedule_with_warmup": math.inf,
    "inverse_sqrt_schedule": 0.5,
}
_FORMS: dict[type, Callable[[Any], Exponent]] = {
    torch_schedulers.LambdaLR: _lambda,
    torch_schedulers.StepLR: lambda s: _geometric(s.gamma),
    torch_schedulers.MultiStepLR: lambda s: _ends_at(s.gamma if s.milestones else 1.0),
    torch_schedulers.ConstantLR: lambda s: 0.0,
    torch_schedulers.LinearLR: lambda s: _ends_at(s.end_factor),
    torch_schedulers.ExponentialLR: lambda s: _geometric(s.gamma),
    torch_schedulers.PolynomialLR: lambda s: math.inf if s.power > 0 else 0.0,
    torch_schedulers.CosineAnnealingLR: lambda s: _ends_at(s.eta_min),
    torch_schedulers.CosineAnnealingWarmRestarts: lambda s: 0.0,
    torch_schedulers.CyclicLR: _cyclic,
    torch_schedulers.OneCycleLR: lambda s: math.inf,
    torch_schedulers.ReduceLROnPlateau: lambda s: 0.0 if s.eps > 0 or min(s.min_lrs) > 0 else None,
    torch_schedulers.SequentialLR: lambda s: _exponent(parts_of(s)[-1]),
    torch_schedulers.ChainedScheduler: lambda s: _product(map(_exponent, parts_of(s))),
    SWALR: lambda s: _ends_at(min(group["swa_lr"] for group in s.optimizer.param_groups)),
}
