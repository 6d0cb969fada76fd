"""The gain and the descent of a proximal or projected step."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.functional.curvature.secant import gradient_rounding
from lsp_callbacks.functional.trajectory.proximal_step import Promise, descent, promise, proximal_gain
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.cost import forward_cost, products
from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.frozen_preconditioner import coupled_decay, decayed_hessian
from lsp_callbacks.operators.trajectory.optimizer_input import group_of, require_optimizer
from lsp_callbacks.operators.trajectory.proximal import flat_parameters, proximal_jacobian, update
from lsp_callbacks.operators.trajectory.step_jacobian import parameter_jacobian
from lsp_callbacks.operators.trajectory.update_rules import decoupled, formula
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.step.flat import displaced, split
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot

#: Of the numbers that a state holds, in its order.
_NAMES = ("gain", "gain_residual", "gain_bound", "descent", "descent_promised", "descent_error")


class ProximalStep(Quantity):
    """Whether ``theta+ = prox(step(theta))`` stretches small differences, and whether the objective descends.

    ``prox_gain = ||d theta+ / d theta||`` of one step, the optimizer's state held: Katende's ``sigma^theta`` of one
    step, from below. ``prox_gain_bound`` stands beside it only where the theory promises a bound of at most 1: plain
    SGD with one rate, a prox of `lsp_callbacks.functional.trajectory.proximal` (which are proximal maps of convex
    functions R), a loss whose curvature at this step is not seen to be negative, and a rate below 2 / L. `refused`
    says why it is absent. On networks it nearly always is, for their losses are not convex.

    ``prox_descent`` is c of ``F(theta+) = F(theta) - c ||theta+ - theta||^2``, with F the batch's loss, R and the
    coupled decay; ``prox_descent_promised`` is ``1 / lr - L / 2``, which holds for losses that are not convex, too. A
    measured c below the promised one by more than ``prox_descent_error``: the curvature along the step is larger than
    at its start; lower the rate. A gain above 1 without a promise is usual; one that stays far above 1: the rate is
    too large.
    Without a `RunContext.prox` the prox is the identity and R is 0.

    Args:
        steps: of Lanczos for the gain, two Hessian products each.
        method: of the Hessian products.

    Attributes:
        refused: why ``prox_gain_bound`` was left out of the last measurement; None if it was not.

    Keys: ``stability/prox_gain``, ``stability/prox_gain_residual`` (absolute); where they exist
    ``stability/prox_gain_bound``, ``stability/prox_descent``, ``stability/prox_descent_promised`` and
    ``stability/prox_descent_error``, in units of 1 / rate.

    Cost: ``2 steps`` Hessian products; under plain SGD 8 more and two gradients: 35 gradients in all.

    Source: Katende, Sec. 6.6; MATH sections 4 (claim 8) and 7.
    """

    name = "proximal_step"
    keys = ("stability/prox_gain", "stability/prox_gain_residual")
    optional = tuple(f"stability/prox_{name}" for name in _NAMES[2:])
    needs_update = True
    numbers: Tensor

    def __init__(self, steps: int = 4, method: Method = "auto"):
        super().__init__()
        whole("steps", steps, 1)
        self.steps, self.method = steps, choice("method", method, *get_args(Method))
        self.refused: str | None = None
        self.add_state("numbers", default=torch.full((len(_NAMES),), math.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        method = resolved(snapshot, self.method)
        gain, descent = products(snapshot, method, 2 * self.steps, tangent=True), 0.0
        if _why_none(snapshot) is None:
            descent = 2 + products(snapshot, method, 9) - products(snapshot, method, 1)  # the same graph
        return {"forward": forward_cost(snapshot), "proximal step": gain + descent}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return product_memory(snapshot, self.method, self.steps + 16)

    def check(self, snapshot: Snapshot) -> None:
        formula(require_optimizer(snapshot))

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        self.check(snapshot)
        D = proximal_jacobian(snapshot) if snapshot.run.prox is not None else _identity(snapshot)
        gain = proximal_gain(parameter_jacobian(snapshot, method=self.method), D, steps=self.steps)
        refused, promised, measured = _why_none(snapshot), None, (math.nan, math.nan)
        if refused is None:
            promised, measured = _measured(snapshot, self.method)
            refused = promised.reason
        bound = math.nan if promised is None or promised.gain is None else promised.gain
        found = (gain.value, gain.residual, bound, measured[0], promised.descent if promised else math.nan, measured[1])
        self.numbers = torch.stack([scalar(one) for one in found])
        self.refused, self.complete = refused, True

    def compute(self) -> dict[str, Tensor]:
        """The last measurement."""
        values = {f"stability/prox_{name}": scalar(value) for name, value in zip(_NAMES, self.numbers)}
        return {key: value for key, value in values.items() if key in self.keys or bool(value.isfinite())}


def _identity(snapshot: Snapshot) -> LinearOperator:
    p = next(iter(snapshot.parameters.values()))
    size = sum(p.numel() for p in snapshot.parameters.values())
    return LinearOperator((size, size), torch.clone, torch.clone, dtype=torch.float64, device=p.device)


def _why_none(snapshot: Snapshot) -> str | None:
    """Why this step is no proximal gradient step of the theory."""
    optimizer = require_optimizer(snapshot)
    groups = [group for group in group_of(snapshot).values() if group is not None]
    if not isinstance(optimizer, torch.optim.SGD) or any(group["momentum"] or group["maximize"] for group in groups):
        return "the step is not that of plain SGD: with momentum or a preconditioner nothing is promised"
    if len({float(group["lr"]) for group in groups}) != 1 or not float(groups[0]["lr"]) or any(map(decoupled, groups)):
        return "the parameters have different rates, or the rate 0"
    if len(groups) < len(snapshot.parameters):
        return "some of the trained parameters are not the optimizer's"
    if snapshot.clipping is not None:
        own = snapshot.flat_gradient
        if own is None or not torch.equal(snapshot.clipping(own), own):
            return "the gradient is clipped"
    if snapshot.run.prox is not None and not hasattr(snapshot.run.prox, "penalty"):
        return (
            "R is not known: give one of lsp_callbacks.functional.trajectory.proximal, or a prox with "
            "penalty(name, tensor)"
        )
    return None


def _measured(snapshot: Snapshot, method: Method) -> tuple[Promise, tuple[float, float]]:
    step = update(snapshot)
    lr = next(float(group["lr"]) for group in group_of(snapshot).values() if group is not None)
    H = decayed_hessian(snapshot, method=method)
    decay, parameters = coupled_decay(snapshot), list(snapshot.parameters.values())

    def objective(loss: Tensor) -> Tensor:
        theta = flat_parameters(snapshot)
        return loss.double() + 0.5 * (decay * theta.square()).sum() + _penalty(snapshot, theta)

    modulus: Any = getattr(snapshot.run.prox, "modulus", 0.0)
    loss, own = replayed_gradient(snapshot)
    before, theta = objective(_mean(snapshot, loss)), flat_parameters(snapshot)
    with displaced(parameters, step, 1.0):
        step = flat_parameters(snapshot) - theta  # rounded, as the weights are
        loss, moved = replayed_gradient(snapshot)
        after = objective(_mean(snapshot, loss))
    distance = norm(step)
    if not bool(distance > 0):
        return promise(H, lr, modulus=modulus), (math.nan, math.nan)
    turned = (moved - own).double()
    along = float(torch.dot(step, turned + decay * step) / distance.square())
    # The rounding of the loss, and of a small one whose parts cancel: that of parameters which are rounded once.
    noise = before.abs() + norm(own.double() * theta)
    error = 4 * torch.finfo(own.dtype).eps * noise / distance.square()
    # A change of the gradient within its rounding is no curvature.
    clear = bool(norm(turned) > 4 * gradient_rounding(own, H, theta))
    promised = promise(H, lr, modulus=modulus, along=along if clear else None)
    return promised, (float(descent(before, after, distance)), float(error))


def _mean(snapshot: Snapshot, loss: Tensor) -> Tensor:
    (mean,) = snapshot.run.ranks.mean(lambda: (loss.detach(),), "the loss of the objective")
    return mean


def _penalty(snapshot: Snapshot, theta: Tensor) -> Tensor:
    prox: Any = snapshot.run.prox
    if prox is None:
        return theta.new_zeros(())
    parts = zip(snapshot.parameters, split(theta, list(snapshot.parameters.values())))
    return torch.stack([prox.penalty(name, part) for name, part in parts]).sum()
