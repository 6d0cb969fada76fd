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
