"""The steps of torch.optim as pure functions of tensors, to be differentiated in forward mode: the second witness."""

import torch

from lsp_callbacks.operators.trajectory.torch_formulas import _adagrad_moment, _adam_moment, _rmsprop_moment
from lsp_callbacks.operators.trajectory.update_rules import decoupled, descent


def sgd(theta, g, state, group, t):
    d, beta, lr = descent(theta, g, group), float(group["momentum"]), float(group["lr"])
    if not beta:
        return theta - lr * d, {}
    # The first buffer is the gradient itself, without dampening.
    m = beta * state["momentum_buffer"] + (1 - float(group["dampening"])) * d if state else d
    return theta - lr * (d + beta * m if group["nesterov"] else m), {"momentum_buffer": m}


def adam(theta, g, state, group, t):
    d, beta, lr = descent(theta, g, group), float(group["betas"][0]), float(group["lr"])
    moment = _adam_moment(d, state, group, t)
    new = {"exp_avg": beta * state.get("exp_avg", torch.zeros_like(d)) + (1 - beta) * d, "exp_avg_sq": moment.nu}
    if group["amsgrad"]:
        new["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(moment.nu)), moment.nu)
    if decoupled(group):
        theta = (1 - lr * float(group["weight_decay"])) * theta
    return theta - lr / (1 - beta**t) * new["exp_avg"] / moment.now(t), new


def rmsprop(theta, g, state, group, t):
    d, beta, alpha = descent(theta, g, group), float(group["momentum"]), float(group["alpha"])
    moment = _rmsprop_moment(d, state, group, t)
    new = {"square_avg": moment.nu}
    if group["centered"]:
        new["grad_avg"] = alpha * state.get("grad_avg", torch.zeros_like(d)) + (1 - alpha) * d
    update = d / moment.now(t)
    if beta > 0:
        update = new["momentum_buffer"] = beta * state.get("momentum_buffer", torch.zeros_like(d)) + update
    return theta - float(group["lr"]) * update, new


def adagrad(theta, g, state, group, t):
    d = descent(theta, g, group)
    moment = _adagrad_moment(d, state, group, t)
    rate = float(group["lr"]) / (1 + (t - 1) * float(group["lr_decay"]))
    return theta - rate * d / moment.now(t), {"sum": moment.nu}


def _adam_means(theta, d, state, group):
    (first, second), zero = map(float, group["betas"]), torch.zeros_like(d)
    kept = 1 - float(group["lr"]) * float(group["weight_decay"]) if decoupled(group) else 1.0
    mean = first * state.get("exp_avg", zero) + (1 - first) * d
    return kept * theta, mean, second * state.get("exp_avg_sq", zero) + (1 - second) * d * d


def nadam(theta, g, state, group, t):
    d = descent(theta, g, group)
    (first, second), eps = group["betas"], group["eps"]
    theta, mean, nu = _adam_means(theta, d, state, group)
    mu, coming = (first * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
    product = group["mu_product"] * mu  # of the steps before: torch keeps it in single precision
    size = (nu / (1 - second**t)).sqrt() + eps
    step = (1 - mu) / (1 - product) * d + coming / (1 - product * coming) * mean
    return theta - float(group["lr"]) * step / size, {"exp_avg": mean, "exp_avg_sq": nu}


def radam(theta, g, state, group, t):
    d = descent(theta, g, group)
    (first, second), eps = group["betas"], group["eps"]
    theta, mean, nu = _adam_means(theta, d, state, group)
    most = 2 / (1 - second) - 1
    length = most - 2 * t * second**t / (1 - second**t)
    step = mean / (1 - first**t)
    if length > 5:
        rectified = ((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) ** 0.5
        step = step * rectified * (1 - second**t) ** 0.5 / (nu.sqrt() + eps)
    return theta - float(group["lr"]) * step, {"exp_avg": mean, "exp_avg_sq": nu}


def adamax(theta, g, state, group, t):
    d, (first, second) = descent(theta, g, group), group["betas"]
    mean = first * state.get("exp_avg", torch.zeros_like(d)) + (1 - first) * d
    size = d.abs() + group["eps"]
    if "exp_inf" in state:
        size = torch.maximum(second * state["exp_inf"], size)
    return theta - float(group["lr"]) / (1 - first**t) * mean / size, {"exp_avg": mean, "exp_inf": size}


FORMULAS = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
}
