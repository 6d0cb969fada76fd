"""The steps of torch.optim as pure functions of tensors, to be differentiated in forward mode: the second witness."""

import torch

from lsp_callbacks.operators.trajectory.update_rules import (
    _adagrad_moment,
    _adam_moment,
    _rmsprop_moment,
    decoupled,
    descent,
)


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


FORMULAS = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
}
