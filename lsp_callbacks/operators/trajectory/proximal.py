"""Maps applied to the weights after the optimizer's step, as part of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.double_backward import jacobian
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.hessian import Method
from lsp_callbacks.operators.trajectory.step_jacobian import step_jacobian, step_response
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.operators.trajectory.update_rules import formula_of
from lsp_callbacks.step.flat import flatten, split
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: How far the parameters may be from where the optimizer's step should leave them, relative to the update.
TOLERANCE = 1e-3


def proximal(snapshot: Snapshot, theta: Tensor) -> Tensor:
    """Return ``prox(theta)``, flat, by `RunContext.prox` with each parameter's learning rate; differentiable.

    Parameters that the optimizer does not hold stay as they are.
    """
    if snapshot.run.prox is None:
        return theta
    parameters = list(snapshot.parameters.values())
    parts = []
    for (name, group), part in zip(snapshot.groups.items(), split(theta, parameters)):
        moved = part if group is None else snapshot.run.prox(name, part, float(group.get("lr") or 0.0))
        if not isinstance(moved, Tensor) or moved.shape != part.shape:
            raise Unmeasurable(f"prox({name!r}, tensor, lr) must return a tensor of the shape {tuple(part.shape)}")
        parts.append(moved)
    return flatten(parts, parameters)


def update(snapshot: Snapshot) -> Tensor:
    """Return ``theta+ - theta``, flat, in float64: the optimizer's step and then the prox.

    Cost: see `displacement`.
    """
    step = displacement(snapshot)
    if snapshot.run.prox is None:
        return step
    theta = flat_parameters(snapshot)
    with torch.no_grad():
        return proximal(snapshot, theta + step) - theta


@computed_once
def proximal_jacobian(snapshot: Snapshot) -> LinearOperator:
    """Return ``D prox`` at the point where the optimizer's step ends, in float64, with its adjoint.

    At a kink of the prox it is the derivative that autograd takes: of one side. Steps end there with probability 0,
    unless they do not move.

    Raises:
        Unmeasurable: a prox that autograd cannot differentiate, or whose derivative is not finite, as that of singular
            vectors where two singular values coincide.

    Cost: no gradient of the loss.
    """
    with torch.no_grad():
        half = (flat_parameters(snapshot) + displacement(snapshot)).detach()
    with torch.enable_grad():
        half.requires_grad_()
        after = proximal(snapshot, half)
        if not after.requires_grad:
            raise Unmeasurable(
                "prox returns a tensor without a graph (torch.no_grad, .data, numpy): write it in operations that "
                "autograd can differentiate"
            )
        D = jacobian(after, half)

    def finite(t: Tensor) -> Tensor:
        if not bool(torch.isfinite(t).all()):
            raise Unmeasurable(
                "the derivative of prox is not finite where the step ends (singular values that coincide, a norm at 0)"
                ": leave this quantity out, or use a prox that is differentiable there"
            )
        return t

    return replace(D, apply=lambda v: finite(D @ v), adjoint=lambda w: finite(D.T @ w))


def update_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """Return ``D prox . A_t``: the derivative of the whole update, see `step_jacobian` and `proximal_jacobian`.

    The prox acts on the parameters' block; it does not change the optimizer's state. Cost: one Hessian product.
    """
    return _mapped(snapshot, step_jacobian(snapshot, method=method))


def update_response(snapshot: Snapshot) -> LinearOperator:
    """Return the `step_response` of the whole update: parameters and state by a change of the step's gradient."""
    return _mapped(snapshot, step_response(snapshot))


def _mapped(snapshot: Snapshot, step: LinearOperator) -> LinearOperator:
    """Apply the prox to the parameters' block of a step, which comes first."""
    if snapshot.run.prox is None:
        return step
    D, n = proximal_jacobian(snapshot), sum(p.numel() for p in snapshot.parameters.values())

    def product(z: Tensor) -> Tensor:
        moved = step @ z
        return torch.cat([(D @ moved[:n]).to(moved), moved[n:]])

    def adjoint(w: Tensor) -> Tensor:
        return step.T @ torch.cat([(D.T @ w[:n]).to(w), w[n:]])

    transpose = None if step.adjoint is None else adjoint
    return LinearOperator(step.shape, product, transpose, dtype=step.dtype, device=step.device)


@dataclass(frozen=True)
class Expected:
    """Where a step should leave the parameters.

    Attributes:
        parameters: those that the optimizer holds.
        after: their values after the step, flat, in float64.
        distance: norm of the update.
        tolerance: how far off they may be, relative to it.
    """

    parameters: list[nn.Parameter]
    after: Tensor
    distance: float
    tolerance: float = TOLERANCE

    def met(self) -> bool:
        """Return whether they are there now, to the tolerance, and rounding; True where it is not finite."""
        if not math.isfinite(self.distance):  # a gradient with an infinity does not prove another map
            return True
        now = flatten([p.detach().double() for p in self.parameters], self.parameters)
        rounding = 4 * torch.finfo(self.parameters[0].dtype).eps * float(torch.linalg.vector_norm(self.after))
        return float(torch.linalg.vector_norm(now - self.after)) <= self.tolerance * self.distance + rounding


def expected(snapshot: Snapshot) -> Expected:
    """Return where the step and the prox should leave the parameters. Cost: see `displacement`."""
    move = update(snapshot)
    held = [group is not None for group in snapshot.groups.values()]
    parameters = list(snapshot.parameters.values())
    parts = [part for part, moves in zip(split(flat_parameters(snapshot) + move, parameters), held) if moves]
    moving = [p for p, moves in zip(parameters, held) if moves]
    rule = formula_of(snapshot.require_optimizer())
    tolerance = TOLERANCE if rule is None else max(TOLERANCE, rule.rounding)
    return Expected(moving, flatten(parts, moving), float(torch.linalg.vector_norm(move)), tolerance)


def flat_parameters(snapshot: Snapshot) -> Tensor:
    """Return theta, flat, in float64."""
    parameters = list(snapshot.parameters.values())
    return flatten([p.detach().double() for p in parameters], parameters)
