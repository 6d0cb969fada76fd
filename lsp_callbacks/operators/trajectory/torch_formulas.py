"""The derivatives of the steps of SGD, Adam, AdamW, RMSprop and Adagrad, in closed form."""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from lsp_callbacks.operators.trajectory.update_rules import (
    Formula,
    Group,
    Linear,
    Moment,
    State,
    averaged,
    by_descent,
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


def _sgd(at: State, group: Group, t: float) -> dict[str, Linear]:
    d, beta, lr = by_descent(group), float(group["momentum"]), float(group["lr"])
    if not beta:
        return {"theta": combined((1.0, itself("theta")), (-lr, d))}
    m = d  # the first buffer is the gradient itself, without dampening
    if "momentum_buffer" in at:
        m = combined((beta, itself("momentum_buffer")), (1 - float(group["dampening"]), d))
    update = combined((1.0, d), (beta, m)) if group["nesterov"] else m
    return {"theta": combined((1.0, itself("theta")), (-lr, update)), "momentum_buffer": m}


def _adam_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    beta, eps = float(group["betas"][1]), float(group["eps"])
    nu = averaged(state.get("exp_avg_sq"), d, beta)
    floor: float | Tensor = 0.0
    if group["amsgrad"]:
        floor = state["max_exp_avg_sq"] if "max_exp_avg_sq" in state else torch.zeros_like(d)
    return Moment(nu, beta, 1 - beta, lambda nu, t, steps: root(nu).div_((1 - beta**t) ** 0.5).add_(eps), floor=floor)


def _adam(at: State, group: Group, t: float) -> dict[str, Linear]:
    value, d, beta, lr = descent_at(at, group), by_descent(group), float(group["betas"][0]), float(group["lr"])
    moment = _adam_moment(value, at, group, t)
    mean = running_mean(at.get("exp_avg"), value, beta)
    new = {
        "exp_avg": combined((beta, itself("exp_avg")), (1 - beta, d)),
        "exp_avg_sq": combined((moment.keep, itself("exp_avg_sq")), (2 * moment.share * value, d)),
    }
    nu, by_nu = moment.nu, new["exp_avg_sq"]
    if isinstance(moment.floor, Tensor):
        before = (moment.floor > nu).to(nu) + 0.5 * (moment.floor == nu).to(nu)
        by_nu = combined((before, itself("max_exp_avg_sq")), (1 - before, by_nu))
        nu, new["max_exp_avg_sq"] = torch.maximum(moment.floor, nu), by_nu
    divided = moment.denominator(nu, t, 0).reciprocal_()
    kept, rate = 1 - lr * float(group["weight_decay"]) if decoupled(group) else 1.0, lr / (1 - beta**t)
    # The update itself comes first: what divides by two more gradients leaves float32 where it begins far from 1.
    by_root = mean.mul_(divided).mul_(rate / (1 - moment.keep**t) ** 0.5).mul_(divided).mul_(slope_of_root(nu))
    divided.mul_(rate)
    theta = combined(
        (kept, itself("theta")), (1.0, {k: divided * -v for k, v in new["exp_avg"].items()}), (by_root, by_nu)
    )
    return {"theta": theta} | new


def _rmsprop_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    alpha, eps = float(group["alpha"]), float(group["eps"])
    nu = averaged(state.get("square_avg"), d, alpha)
    if not group["centered"]:
        return Moment(nu, alpha, 1 - alpha, lambda nu, t, steps: root(nu).add_(eps))
    mean = running_mean(state.get("grad_avg"), d, alpha)

    def denominator(nu: Tensor, t: float, steps: int) -> Tensor:
        later = alpha**steps * mean + (1 - alpha**steps) * d if steps else mean
        return root(nu - later * later) + eps

    return Moment(nu, alpha, 1 - alpha, denominator)


def _rmsprop(at: State, group: Group, t: float) -> dict[str, Linear]:
    value, d, beta, alpha = descent_at(at, group), by_descent(group), float(group["momentum"]), float(group["alpha"])
    moment = _rmsprop_moment(value, at, group, t)
    new = {"square_avg": combined((alpha, itself("square_avg")), (2 * (1 - alpha) * value, d))}
    spread, by_spread = moment.nu, new["square_avg"]
    if group["centered"]:
        new["grad_avg"] = combined((alpha, itself("grad_avg")), (1 - alpha, d))
        mean = running_mean(at.get("grad_avg"), value, alpha)
        spread, by_spread = spread - mean * mean, combined((1.0, by_spread), (-2 * mean, new["grad_avg"]))
    divisor = moment.now(t)
    update = combined((1 / divisor, d), (-value / divisor / divisor * slope_of_root(spread), by_spread))
    if beta > 0:
        update = new["momentum_buffer"] = combined((beta, itself("momentum_buffer")), (1.0, update))
    return {"theta": combined((1.0, itself("theta")), (-float(group["lr"]), update))} | new


def _adagrad_moment(d: Tensor, state: State, group: Group, t: float) -> Moment:
    eps, begin = float(group["eps"]), float(group["initial_accumulator_value"])
    return Moment(state["sum"] + d * d, 1.0, 1.0, lambda nu, t, steps: root(nu) + eps, begin=begin)


def _adagrad(at: State, group: Group, t: float) -> dict[str, Linear]:
    value, d = descent_at(at, group), by_descent(group)
    moment = _adagrad_moment(value, at, group, t)
    rate, divisor = float(group["lr"]) / (1 + (t - 1) * float(group["lr_decay"])), moment.now(t)
    total = combined((1.0, itself("sum")), (2 * value, d))
    by_total = rate * value / divisor / divisor * slope_of_root(moment.nu)
    return {"theta": combined((1.0, itself("theta")), (-rate / divisor, d), (by_total, total)), "sum": total}


register(
    torch.optim.SGD,
    Formula(
        blocks=lambda group: ("momentum_buffer",) if group["momentum"] else (),
        momentum=itemgetter("momentum"),
        derivatives=_sgd,
    ),
)
register(
    torch.optim.Adam,
    like_adam(
        blocks=lambda group: ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())),
        derivatives=_adam,
        second_moment=_adam_moment,
    ),
)
register(
    torch.optim.RMSprop,
    Formula(
        blocks=lambda group: (
            *(("momentum_buffer",) if group["momentum"] > 0 else ()),
            "square_avg",
            *(("grad_avg",) if group["centered"] else ()),
        ),
        momentum=itemgetter("momentum"),
        derivatives=_rmsprop,
        second_moment=_rmsprop_moment,
    ),
)
register(
    torch.optim.Adagrad,
    Formula(
        blocks=lambda group: ("sum",),
        momentum=lambda group: 0.0,
        derivatives=_adagrad,
        second_moment=_adagrad_moment,
    ),
)
