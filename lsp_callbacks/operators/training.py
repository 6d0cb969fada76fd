"""The Jacobian of one optimizer step. The only place where rates and betas are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature import Method, hessian, per_parameter
from lsp_callbacks.snapshot import Snapshot, Unmeasurable


@dataclass(frozen=True)
class SGDRule:
    """``m+ = beta m + (1 - tau) d``, ``theta+ = theta - eta m+`` with ``d = sign grad L + wd theta``.

    Each field has one entry for each trainable parameter tensor, in the order of ``snapshot.parameters``.

    Attributes:
        lr: eta; 0 for a parameter that the optimizer does not hold.
        momentum: beta.
        dampening: tau.
        weight_decay: wd, coupled.
        nesterov: whether the update is ``d + beta m+`` instead of ``m+``.
        sign: -1 under ``maximize``.
        started: whether the momentum buffer exists; PyTorch's first buffer is d itself, without dampening.
        moved: whether the parameter has a gradient in this step; the optimizer passes over the others.
    """

    lr: list[float]
    momentum: list[float]
    dampening: list[float]
    weight_decay: list[float]
    nesterov: list[bool]
    sign: list[float]
    started: list[bool]
    moved: list[bool]

    @property
    def has_state(self) -> bool:
        """Whether the step moves a momentum buffer beside the parameters."""
        return any(self.momentum)


def update_rule(snapshot: Snapshot) -> SGDRule:
    """What the step's optimizer does with its gradient.

    Raises:
        Unmeasurable: no optimizer, one that is not modelled, or gradients that are clipped or accumulated.
    """
    if snapshot.optimizer is None:
        raise Unmeasurable("no optimizer is known: pass optimizer=... to the Snapshot")
    if snapshot.unmodelled:
        raise Unmeasurable(snapshot.unmodelled)
    return rule_of(snapshot.optimizer, snapshot)


@singledispatch
def rule_of(optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> SGDRule:
    """Registered for each optimizer whose step is modelled; subclasses with a step of their own are refused."""
    raise Unmeasurable(
        f"the update of {type(optimizer).__name__} is not modelled (torch.optim.SGD is): "
        "its sharpness limit and exponent are left out"
    )


@rule_of.register
def _(optimizer: torch.optim.SGD, snapshot: Snapshot) -> SGDRule:
    if type(optimizer).step is not torch.optim.SGD.step:
        raise Unmeasurable(f"{type(optimizer).__name__} overrides SGD.step: its update is not modelled")
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    # What another optimizer holds does not move in this step, and has no say in its betas.
    absent = {**optimizer.param_groups[0], "lr": 0.0, "weight_decay": 0.0}
    groups = [group_of.get(id(p), absent) for p in snapshot.parameters.values()]
    gradient = snapshot.gradient
    return SGDRule(
        lr=[float(g["lr"]) for g in groups],
        momentum=[float(g["momentum"]) for g in groups],
        dampening=[float(g["dampening"]) for g in groups],
        weight_decay=[float(g["weight_decay"]) for g in groups],
        nesterov=[bool(g["nesterov"]) for g in groups],
        sign=[-1.0 if g["maximize"] else 1.0 for g in groups],
        started=[optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in snapshot.parameters.values()],
        moved=[gradient is None or gradient[name] is not None for name in snapshot.parameters],
    )


def decayed_hessian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``H' = sign H + wd``: the derivative of what SGD moves against, coupled weight decay included."""
    rule, H = update_rule(snapshot), hessian(snapshot, method=method)
    sign, decay = per_parameter(rule.sign, snapshot), per_parameter(rule.weight_decay, snapshot)

    def product(v: Tensor) -> Tensor:
        return sign * (H @ v) + decay * v

    if isinstance(sign, Tensor):
        raise Unmeasurable("some parameter groups maximize and others minimize: H' is not symmetric")
    return LinearOperator(H.shape, product, product, dtype=H.dtype, device=H.device)


def preconditioned_hessian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``D^(1/2) H' D^(1/2)`` with D the per-parameter learning rates: symmetric, with the eigenvalues of ``D H'``."""
    root = per_parameter(update_rule(snapshot).lr, snapshot) ** 0.5
    H = decayed_hessian(snapshot, method=method)

    def product(v: Tensor) -> Tensor:
        return root * (H @ (root * v))

    return LinearOperator(H.shape, product, product, dtype=H.dtype, device=H.device)


def step_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``A_t``, the derivative of one SGD step with respect to its state.

    Without momentum the state is ``v`` (a displacement of the parameters): ``v+ = v - eta H' v``. With momentum it
    is ``(v, m)``, m in units of a gradient: ``m+ = beta m + (1 - tau) H' v`` (``m+ = H' v`` in the first step),
    ``v+ = v - eta m+``; Nesterov ``v+ = v - eta (H' v + beta m+)``. Parameters without a gradient do not move.

    Args:
        snapshot: a step, with its optimizer before the update.
        method: of the Hessian products.

    Returns:
        An operator of shape ``(P, P)``, or ``(2P, 2P)`` with momentum. It has no adjoint.

    Raises:
        Unmeasurable: see `update_rule`.

    Cost: one Hessian product; none for ``v = 0``. Source: MATH section 1; torch.optim.SGD.
    """
    rule, H = update_rule(snapshot), hessian(snapshot, method=method)

    def spread(values: list) -> Tensor | float:
        return per_parameter([float(x) for x in values], snapshot)

    lr = spread([eta * moved for eta, moved in zip(rule.lr, rule.moved)])
    sign, decay = spread(rule.sign), spread(rule.weight_decay)
    # Where a parameter does not move, its buffer stays: m+ = 1 m + 0 d.
    beta = spread([b if moved else 1.0 for b, moved in zip(rule.momentum, rule.moved)])
    # The first buffer is d itself; without momentum m+ = d stands for the step.
    gain = spread(
        [
            0.0 if not moved else 1.0 - t * (started and b > 0)
            for t, started, b, moved in zip(rule.dampening, rule.started, rule.momentum, rule.moved)
        ]
    )
    keep = spread([float(started or not moved) for started, moved in zip(rule.started, rule.moved)])
    nesterov = spread([n and b > 0 for n, b in zip(rule.nesterov, rule.momentum)])
    n = H.shape[0]

    def step(z: Tensor) -> Tensor:
        v = z[:n]
        d = sign * (H @ v) + decay * v
        if not rule.has_state:
            return v - lr * d
        m = keep * beta * z[n:] + gain * d
        return torch.cat([v - lr * (nesterov * (d + beta * m) + (1 - nesterov) * m), m])

    size = 2 * n if rule.has_state else n
    return LinearOperator((size, size), step, dtype=H.dtype, device=H.device)


def state_weight(snapshot: Snapshot) -> Tensor | float:
    """Weights ``(1, eta)`` of the norm ``||(v, eta m)||``, in which both halves are displacements."""
    rule = update_rule(snapshot)
    if not rule.has_state:
        return 1.0
    like = torch.cat([p.detach().reshape(-1) for p in snapshot.parameters.values()])
    rate = per_parameter([eta or 1.0 for eta in rule.lr], snapshot)
    return torch.cat([torch.ones_like(like), torch.as_tensor(rate).to(like).expand_as(like)])


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
    held = [k for k, p in enumerate(snapshot.parameters.values()) if any(p is q for q in _held(optimizer))]
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


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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
