"""One step of an optimizer whose preconditioner is held fixed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from lsp_callbacks.operators.training import rule_of
from lsp_callbacks.snapshot import Snapshot, Unmeasurable


@dataclass(frozen=True)
class FrozenRule:
    """``m+ = beta m + (1 - tau) d``, ``theta+ = (1 - lr wd') theta - (lr / c) D m+``, ``d = grad L + wd theta``.

    One step of an optimizer whose preconditioner D is held fixed: SGD (D is 1) and Adam's family. Freezing D drops what
    a change of the gradient does to it.

    Attributes:
        lr: the largest rate of the groups.
        scale: the diagonal of D times each parameter's rate relative to ``lr``; 0 for what does not move.
        momentum: beta, or Adam's beta1.
        dampening: tau; beta1 for Adam, which averages.
        nesterov: see `SGDRule`.
        weight_decay: wd of each parameter, coupled, times its relative rate.
        decoupled_decay: wd' of each parameter, as in AdamW, times its relative rate.
        correction: c, Adam's bias correction ``1 - beta1^t``.
        frozen: whether D is a preconditioner held fixed.
    """

    lr: float
    scale: dict[str, float | Tensor]
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: dict[str, float]
    decoupled_decay: dict[str, float]
    correction: float = 1.0
    frozen: bool = False


def frozen_rule(snapshot: Snapshot, *, foreseen: dict[str, Tensor] | None = None) -> FrozenRule:
    """The step's optimizer with its preconditioner held fixed.

    Args:
        snapshot: a step with its optimizer, before the update.
        foreseen: gradients that a coming batch may bring. A preconditioner that has not met a feature yet is as good as
            infinite there; held fixed, it must at least have met the batch that it is to act on.

    Raises:
        Unmeasurable: no optimizer, one that is not modelled, groups with different betas, ``maximize``, or gradients
            that are clipped or accumulated.
    """
    if snapshot.optimizer is None:
        raise Unmeasurable("no optimizer is known: pass optimizer=... to the Snapshot")
    if snapshot.unmodelled:
        raise Unmeasurable(snapshot.unmodelled)
    return frozen_rule_of(snapshot.optimizer, snapshot, foreseen or {})


@singledispatch
def frozen_rule_of(optimizer: torch.optim.Optimizer, snapshot: Snapshot, foreseen: dict[str, Tensor]) -> FrozenRule:
    """Registered for each optimizer that is a fixed linear map of its gradients once its preconditioner is frozen."""
    raise Unmeasurable(
        f"the update of {type(optimizer).__name__} is not modelled (torch.optim.SGD, Adam and AdamW are): its critical "
        "learning rate is left out"
    )


@frozen_rule_of.register
def _(optimizer: torch.optim.SGD, snapshot: Snapshot, foreseen: dict[str, Tensor]) -> FrozenRule:
    rule = rule_of(optimizer, snapshot)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = [k for k, p in enumerate(snapshot.parameters.values()) if id(p) in own]
    betas = {(rule.momentum[k], rule.dampening[k], rule.nesterov[k], rule.sign[k]) for k in held}
    momentum, dampening, nesterov, sign = _common(betas)
    if sign < 0:
        raise Unmeasurable("maximize=True: the Gauss-Newton matrix of a loss that is maximised is not positive")
    lr, scale = _relative(optimizer, snapshot)
    moved = dict(zip(snapshot.parameters, rule.moved))
    return FrozenRule(
        lr=lr,
        scale={name: value * moved[name] for name, value in scale.items()},
        momentum=momentum,
        dampening=dampening if momentum else 0.0,
        nesterov=bool(nesterov),
        weight_decay={name: wd * scale[name] for name, wd in zip(snapshot.parameters, rule.weight_decay)},
        decoupled_decay=dict.fromkeys(snapshot.parameters, 0.0),
    )


@frozen_rule_of.register
def _(optimizer: torch.optim.Adam, snapshot: Snapshot, foreseen: dict[str, Tensor]) -> FrozenRule:
    if type(optimizer).step not in (torch.optim.Adam.step, torch.optim.AdamW.step):
        raise Unmeasurable(f"{type(optimizer).__name__} overrides Adam.step: its update is not modelled")
    beta, maximize = _common({(g["betas"][0], g["maximize"]) for g in optimizer.param_groups})
    if maximize:
        raise Unmeasurable("maximize=True: the Gauss-Newton matrix of a loss that is maximised is not positive")
    if any(g["weight_decay"] and not g["decoupled_weight_decay"] for g in optimizer.param_groups):
        raise Unmeasurable("Adam's coupled weight decay is not modelled with a frozen preconditioner: use AdamW's")
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    held = {name: p for name, p in snapshot.parameters.items() if id(p) in group_of}
    lr, relative = _relative(optimizer, snapshot)
    scale: dict[str, float | Tensor] = {}
    first = {name: 1 - beta ** (float(optimizer.state.get(p, {}).get("step", 0)) + 1) for name, p in held.items()}
    correction = max(first.values(), default=1.0)
    for name, p in snapshot.parameters.items():
        g = None if snapshot.gradient is None else snapshot.gradient[name]
        if g is None or id(p) not in group_of:
            scale[name] = 0.0
            continue
        group, state = group_of[id(p)], optimizer.state.get(p, {})
        t = float(state["step"]) + 1 if state else 1.0
        beta2 = group["betas"][1]
        second = (beta2 * state["exp_avg_sq"] if state else 0) + (1 - beta2) * g.detach().square()
        if group["amsgrad"] and state:
            second = torch.maximum(second, state["max_exp_avg_sq"])
        if name in foreseen:
            second = torch.maximum(second, (1 - beta2) * foreseen[name].square())
        scale[name] = relative[name] * correction / first[name] / ((second / (1 - beta2**t)).sqrt() + group["eps"])
    decay = {
        name: group_of.get(id(p), {"weight_decay": 0.0})["weight_decay"] for name, p in snapshot.parameters.items()
    }
    return FrozenRule(
        lr=lr,
        scale=scale,
        momentum=beta,
        dampening=beta,
        nesterov=False,
        weight_decay=dict.fromkeys(snapshot.parameters, 0.0),
        decoupled_decay={name: wd * relative[name] for name, wd in decay.items()},
        correction=correction,
        frozen=True,
    )


def _common(betas: set[tuple]) -> tuple:
    if len(betas) > 1:
        raise Unmeasurable(
            "parameter groups with different momentum, dampening, nesterov or maximize have no common critical rate: "
            "leave sgd_stability out, or give all groups the same"
        )
    return next(iter(betas))


def _relative(optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> tuple[float, dict[str, float]]:
    """The largest rate, and each parameter's relative to it; from ``initial_lr`` where a warm-up begins at 0."""
    groups = optimizer.param_groups
    own = "lr" if any(float(g["lr"]) for g in groups) else "initial_lr"
    rates = {id(p): float(g.get(own, 1.0)) for g in groups for p in g["params"]}
    top = max(rates.values()) or 1.0
    relative = {name: rates.get(id(p), 0.0) / top for name, p in snapshot.parameters.items()}
    return max(float(g["lr"]) for g in groups), relative
