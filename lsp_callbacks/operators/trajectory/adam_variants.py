"""The derivatives of the steps of NAdam, RAdam and Adamax, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.operators.trajectory.update_rules import (
    Group,
    Linear,
    Moment,
    State,
    averaged,
    bias_correction,
    by_descent,
    by_factors,
    combined,
    decoupled,
    descent_at,
    itself,
    like_adam,
    register,
    root,
    running_mean,
    slope_of_root,
)

#: RAdam has no preconditioner while its second moment counts for so few gradients.
FEW = 5.0


def _kept(group: Group) -> float:
    return 1 - float(group["lr"]) * float(group["weight_decay"]) if decoupled(group) else 1.0


def _means(at: State, group: Group, d: Tensor) -> tuple[Linear, Linear]:
    """Return the derivatives of both running means of Adam."""
    first, second = map(float, group["betas"])
    by_d = by_descent(group)
    return (
        combined((first, itself("exp_avg")), (1 - first, by_d)),
        combined((second, itself("exp_avg_sq")), (2 * (1 - second) * d, by_d)),
    )


# -- NAdam -----------------------------------------------------------------------------------------------------------


def _momentum_of(group: Group, t: float) -> float:
    """Return ``mu_t``, the share of the momentum in step t, which grows from beta1 / 2 to beta1."""
    return float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))


def nadam_shares(group: Group, t: float) -> tuple[float, float]:
    """Return a and b of the step ``theta - lr (a d + b m+) / denominator``, each with its bias correction.

    ``mu_product``, that of the steps before, is the optimizer's own where it has one; some steps later it is continued.
    """
    mu, coming = _momentum_of(group, t), _momentum_of(group, t + 1)
    product = _product(group, t)
    return (1 - mu) / (1 - product), coming / (1 - product * coming)


def _correction_and_direct(group: Group, t: float) -> tuple[float, float]:
    """Return c and a of the same step, ``theta - (lr / c) (m+ + a d) / denominator``, see `Formula`."""
    direct, share = nadam_shares(group, t)
    return (1 / share, direct / share) if share else (1 / direct, 0.0)  # without momentum m+ is d


def _product(group: Group, t: float) -> float:
    held, of = group.get("mu_product", 1.0), int(group.get("step", 0))
    for k in range(of + 1, int(t) + 1):
        held *= _momentum_of(group, k)
        if held < 1e-18:
            return 0.0
    return held


def _adam_denominator(d: Tensor, state: State, group: Group, t: float) -> Moment:
    beta, eps = float(group["betas"][1]), float(group["eps"])
    nu = averaged(state.get("exp_avg_sq"), d, beta)
    return Moment(nu, beta, 1 - beta, lambda nu, t, steps: root(nu).div_((1 - beta**t) ** 0.5).add_(eps))


def _nadam(at: State, group: Group, t: float) -> dict[str, Linear]:
    d, (direct, share) = descent_at(at, group), nadam_shares(group, t)
    by_mean, by_nu = _means(at, group, d)
    moment, lr = _adam_denominator(d, at, group, t), float(group["lr"])
    divided = moment.now(t).reciprocal_()
    update = share * running_mean(at.get("exp_avg"), d, float(group["betas"][0])) + direct * d
    by_root = lr / (1 - moment.keep**t) ** 0.5 * (update * divided) * divided * slope_of_root(moment.nu)
    moved = combined((direct, by_descent(group)), (share, by_mean))
    theta = combined((_kept(group), itself("theta")), (-lr, combined((divided, moved))), (by_root, by_nu))
    return {"theta": theta, "exp_avg": by_mean, "exp_avg_sq": by_nu}


# -- RAdam -----------------------------------------------------------------------------------------------------------


def rectification(beta: float, t: float) -> float | None:
    """Return RAdam's factor r of step t; None while the step has no preconditioner. Source: Liu et al. 2020."""
    most = 2 / (1 - beta) - 1
    length = most - 2 * t * beta**t / (1 - beta**t)
    if length <= FEW:
        return None
    return math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))


def _radam_denominator(d: Tensor, state: State, group: Group, t: float) -> Moment:
    beta, eps = float(group["betas"][1]), float(group["eps"])

    def denominator(nu: Tensor, t: float, steps: int) -> Tensor:
        factor = rectification(beta, t)
        if factor is None:
            return torch.ones_like(nu)
        return root(nu).add_(eps).div_(factor * (1 - beta**t) ** 0.5)

    return Moment(averaged(state.get("exp_avg_sq"), d, beta), beta, 1 - beta, denominator)


def _radam(at: State, group: Group, t: float) -> dict[str, Linear]:
    d = descent_at(at, group)
    by_mean, by_nu = _means(at, group, d)
    moment = _radam_denominator(d, at, group, t)
    rate, divided = float(group["lr"]) / bias_correction(group, t), moment.now(t).reciprocal_()
    terms = [(_kept(group), itself("theta")), (-rate, combined((divided, by_mean)))]
    factor = rectification(moment.keep, t)
    if factor is not None:
        update = running_mean(at.get("exp_avg"), d, float(group["betas"][0])).mul_(divided)
        by_root = rate / (factor * (1 - moment.keep**t) ** 0.5) * update * divided * slope_of_root(moment.nu)
        terms.append((by_root, by_nu))
    return {"theta": combined(*terms), "exp_avg": by_mean, "exp_avg_sq": by_nu}


# -- Adamax ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """The denominator ``u+ = max(beta2 u, |d| + eps)`` of Adamax.

    Attributes:
        size: u after the step.
        keep: beta2.
    """

    size: Tensor
    keep: float

    def now(self, t: float) -> Tensor:
        """Return the denominator of this step, a new tensor."""
        return self.size.clone()

    def ahead(self, t: float, steps: int, square: Tensor | None, prior: float = 0.0) -> Tensor:
        """Return the denominator ``steps`` later: at least the root mean square of the coming gradients.

        The largest of several is above it, so that stability errs on the early side. Without ``square`` the coming
        ones are as large as u now; in a table, drawn to what rows and columns have in common, see `Moment.ahead`.
        """
        if square is None:
            seen = min(t, 1 / (1 - self.keep)) if self.keep < 1 else t
            square = self.size * self.size
            if prior and square.ndim > 1:
                square = torch.lerp(square, by_factors(square), prior / (seen + prior))
        return torch.maximum(self.keep**steps * self.size, square.sqrt())


def _adamax_denominator(d: Tensor, state: State, group: Group, t: float) -> Largest:
    beta, size = float(group["betas"][1]), d.abs() + float(group["eps"])
    return Largest(torch.maximum(beta * state["exp_inf"], size) if "exp_inf" in state else size, beta)


def _adamax(at: State, group: Group, t: float) -> dict[str, Linear]:
    d, by_d = descent_at(at, group), by_descent(group)
    first, second = map(float, group["betas"])
    size, by_size = d.abs() + float(group["eps"]), combined((d.sign(), by_d))
    if "exp_inf" in at:  # where both are equal autograd, too, takes half of each
        faded = second * at["exp_inf"]
        before = (faded > size).to(d) + 0.5 * (faded == size).to(d)
        by_size = combined((before * second, itself("exp_inf")), (1 - before, by_size))
        size = torch.maximum(faded, size)
    by_mean = combined((first, itself("exp_avg")), (1 - first, by_d))
    rate, divided = float(group["lr"]) / bias_correction(group, t), size.reciprocal()
    by_denominator = rate * (running_mean(at.get("exp_avg"), d, first) * divided) * divided
    theta = combined((1.0, itself("theta")), (-rate, combined((divided, by_mean))), (by_denominator, by_size))
    return {"theta": theta, "exp_avg": by_mean, "exp_inf": by_size}


register(
    torch.optim.NAdam,
    like_adam(
        blocks=lambda group: ("exp_avg", "exp_avg_sq"),
        derivatives=_nadam,
        second_moment=_adam_denominator,
        correction=lambda group, t: _correction_and_direct(group, t)[0],
        direct=lambda group, t: _correction_and_direct(group, t)[1],
        numbers=("mu_product", "step"),
    ),
)
register(
    torch.optim.RAdam,
    like_adam(
        blocks=lambda group: ("exp_avg", "exp_avg_sq"), derivatives=_radam, second_moment=_radam_denominator,
    ),
)  # fmt: skip
register(
    torch.optim.Adamax,
    like_adam(blocks=lambda group: ("exp_avg", "exp_inf"), derivatives=_adamax, second_moment=_adamax_denominator),
)
