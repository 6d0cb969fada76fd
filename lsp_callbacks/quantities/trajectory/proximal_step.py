"""Gain and descent of a proximal or projected step."""

from __future__ import annotations

import math
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.functional.curvature.secant import gradient_rounding
from lsp_callbacks.functional.trajectory.proximal_step import (
    ProximalBounds,
    descent_constant,
    proximal_bounds,
    proximal_gain,
)
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.cost import forward_cost, products
from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.frozen_preconditioner import coupled_decay, decayed_hessian
from lsp_callbacks.operators.trajectory.proximal import flat_parameters, proximal_jacobian, update
from lsp_callbacks.operators.trajectory.step_jacobian import parameter_jacobian
from lsp_callbacks.operators.trajectory.update_rules import decoupled, formula
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import Key
from lsp_callbacks.step.flat import displaced, split
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot


class ProximalStep(Quantity):
    """Gain of ``theta+ = prox(step(theta))`` for small differences, and the descent of the objective.

    ``prox_gain = ||d theta+ / d theta||`` of one step, the optimizer's state held: Katende's ``sigma^theta`` of one
    step, lower bound. ``prox_gain_bound`` is reported only where the theory promises a bound of at most 1: plain SGD
    with one rate, a prox of `lsp_callbacks.functional.trajectory.proximal` (which are proximal maps of convex functions
    R), a loss without measured negative curvature at this step, and a rate below 2 / L. `refused` gives the reason why
    it is absent. For networks it nearly always is, as their losses are not convex.

    ``prox_descent`` is c of ``F(theta+) = F(theta) - c ||theta+ - theta||^2``, with F the batch's loss, R and the
    coupled decay; ``prox_descent_promised`` is ``1 / lr - L / 2``, which holds for losses that are not convex, too.
    Without a `RunContext.prox` the prox is the identity and R is 0.

    Args:
        steps: Lanczos steps for the gain, two Hessian products each.
        method: of the Hessian products.

    Attributes:
        refused: reason why ``prox_gain_bound`` was left out of the last measurement; None if it was not.

    Raises:
        ValueError: for fewer than 1 step, or an unknown method.

    Cost: ``2 steps`` Hessian products; under plain SGD 8 more and two gradients: 35 gradients in all.

    Source: Katende 2025, Sec. 6.6; docs/theory.md, sections What does not hold as printed; The law of SGD, energies,
    kinks.
    """

    name = "proximal_step"
    KEYS: ClassVar = {
        "prox_gain": Key(
            "||d theta+ / d theta|| of one step, prox included, lower bound.",
            "",
            "Above 1 is usual; if it stays far above 1: lower the learning rate.",
        ),
        "prox_gain_residual": Key(
            "Residual of Lanczos, absolute.", error_of="prox_gain", error_format="residual {:.2g}"
        ),
        "prox_gain_bound": Key("Upper bound of prox_gain, where the theory promises one.", optional=True),
        "prox_descent": Key(
            "Fall of the objective divided by the squared length of the step.",
            "1 / learning rate",
            "Below prox_descent_promised by more than its error, the curvature grows along the step: lower the rate.",
            optional=True,
        ),
        "prox_descent_promised": Key("Least that the theory promises of it.", "1 / learning rate", optional=True),
        "prox_descent_error": Key(
            "Rounding error of prox_descent.", "1 / learning rate", optional=True, error_of="prox_descent"
        ),
    }
    needs_update = True

    def __init__(self, steps: int = 4, method: Method = "auto"):
        super().__init__()
        whole("steps", steps, 1)
        self.steps, self.method = steps, choice("method", method, *get_args(Method))
        self.refused: str | None = None

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        method = resolved(snapshot, self.method)
        gain, descent = products(snapshot, method, 2 * self.steps, tangent=True), 0.0
        if _reason_for_no_promise(snapshot) is None:
            descent = 2 + products(snapshot, method, 9) - products(snapshot, method, 1)  # the same graph
        return {"forward": forward_cost(snapshot), "proximal step": gain + descent}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return product_memory(snapshot, self.method, self.steps + 16)

    def check(self, snapshot: Snapshot) -> None:
        formula(snapshot.require_optimizer())

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        self.check(snapshot)
        D = proximal_jacobian(snapshot) if snapshot.run.prox is not None else _identity(snapshot)
        gain = proximal_gain(parameter_jacobian(snapshot, method=self.method), D, steps=self.steps)
        refused, promised, measured = _reason_for_no_promise(snapshot), None, (math.nan, math.nan)
        if refused is None:
            promised, measured = _measured(snapshot, self.method)
            refused = promised.reason
        bound = math.nan if promised is None or promised.gain is None else promised.gain
        self.refused = refused
        where_known = {
            "prox_gain_bound": bound,
            "prox_descent": measured[0],
            "prox_descent_promised": promised.descent if promised else math.nan,
            "prox_descent_error": measured[1],
        }
        gains = {"prox_gain": gain.value, "prox_gain_residual": gain.residual}
        self.finish(gains | {name: value for name, value in where_known.items() if math.isfinite(value)})


def _identity(snapshot: Snapshot) -> LinearOperator:
    p = next(iter(snapshot.parameters.values()))
    size = sum(p.numel() for p in snapshot.parameters.values())
    return LinearOperator((size, size), torch.clone, torch.clone, dtype=torch.float64, device=p.device)


def _reason_for_no_promise(snapshot: Snapshot) -> str | None:
    """Return why this step is no proximal gradient step of the theory; None if it is."""
    optimizer = snapshot.require_optimizer()
    groups = [group for group in snapshot.groups.values() if group is not None]
    if not isinstance(optimizer, torch.optim.SGD) or any(group["momentum"] or group["maximize"] for group in groups):
        return "the step is not that of plain SGD: with momentum or a preconditioner nothing is promised"
    if len({float(group["lr"]) for group in groups}) != 1 or not float(groups[0]["lr"]) or any(map(decoupled, groups)):
        return "the parameters have different rates, or the rate 0"
    if len(groups) < len(snapshot.parameters):
        return "some of the trained parameters are not the optimizer's"
    if snapshot.clipping is not None:
        gradient = snapshot.flat_gradient
        if gradient is None or not torch.equal(snapshot.clipping(gradient), gradient):
            return "the gradient is clipped"
    if snapshot.run.prox is not None and not hasattr(snapshot.run.prox, "penalty"):
        return (
            "R is not known for this prox: use one of lsp_callbacks.functional.trajectory.proximal, or give yours a "
            "method penalty(name, tensor)"
        )
    return None


def _measured(snapshot: Snapshot, method: Method) -> tuple[ProximalBounds, tuple[float, float]]:
    step = update(snapshot)
    lr = next(float(group["lr"]) for group in snapshot.groups.values() if group is not None)
    H = decayed_hessian(snapshot, method=method)
    decay, parameters = coupled_decay(snapshot), list(snapshot.parameters.values())

    def objective(loss: Tensor) -> Tensor:
        theta = flat_parameters(snapshot)
        return loss.double() + 0.5 * (decay * theta.square()).sum() + _penalty(snapshot, theta)

    modulus: Any = getattr(snapshot.run.prox, "modulus", 0.0)
    loss, gradient = replayed_gradient(snapshot)
    before, theta = objective(_mean(snapshot, loss)), flat_parameters(snapshot)
    with displaced(parameters, step, 1.0):
        step = flat_parameters(snapshot) - theta  # rounded, as the weights are
        loss, moved = replayed_gradient(snapshot)
        after = objective(_mean(snapshot, loss))
    distance = norm(step)
    if not bool(distance > 0):
        return proximal_bounds(H, lr, modulus=modulus), (math.nan, math.nan)
    turned = (moved - gradient).double()
    along = float(torch.dot(step, turned + decay * step) / distance.square())
    # Rounding of the loss and, where the parts of a small loss cancel, of the parameters.
    noise = before.abs() + norm(gradient.double() * theta)
    error = 4 * torch.finfo(gradient.dtype).eps * noise / distance.square()
    # A change of the gradient within its rounding is no curvature.
    clear = bool(norm(turned) > 4 * gradient_rounding(gradient, H, theta))
    promised = proximal_bounds(H, lr, modulus=modulus, along=along if clear else None)
    return promised, (float(descent_constant(before, after, distance)), float(error))


def _mean(snapshot: Snapshot, loss: Tensor) -> Tensor:
    (mean,) = snapshot.run.ranks.mean(lambda: (loss.detach(),), "the loss of the objective")
    return mean


def _penalty(snapshot: Snapshot, theta: Tensor) -> Tensor:
    prox: Any = snapshot.run.prox
    if prox is None:
        return theta.new_zeros(())
    parts = zip(snapshot.parameters, split(theta, list(snapshot.parameters.values())))
    return torch.stack([prox.penalty(name, part) for name, part in parts]).sum()
