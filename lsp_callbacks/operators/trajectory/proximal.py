"""What is done to the weights after the optimizer's step, as part of the update map."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.double_backward import jacobian
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.hessian import Method
from lsp_callbacks.operators.trajectory.step_jacobian import (
    clipped_gradient,
    group_of,
    step_jacobian,
    step_response,
    step_tangent,
)
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.step.snapshot import Snapshot, Unmeasurable, flatten, split


def proximal(snapshot: Snapshot, theta: Tensor) -> Tensor:
    """``prox(theta)``, flat, by the step's `RunContext.prox` and each parameter's own learning rate; differentiable.

    Parameters that the optimizer does not hold stay as they are.
    """
    if snapshot.run.prox is None:
        return theta
    parameters = list(snapshot.parameters.values())
    parts = []
    for (name, group), part in zip(group_of(snapshot).items(), split(theta, parameters)):
        moved = part if group is None else snapshot.run.prox(name, part, float(group.get("lr") or 0.0))
        if not isinstance(moved, Tensor) or moved.shape != part.shape:
            raise Unmeasurable(f"prox({name!r}, tensor, lr) did not return a tensor of the shape {tuple(part.shape)}")
        parts.append(moved)
    return flatten(parts, parameters)


def update(snapshot: Snapshot) -> Tensor:
    """``theta+ - theta``, flat, in float64: the optimizer's step and then the prox.

    Cost: see `displacement`.
    """
    step = displacement(snapshot)
    if snapshot.run.prox is None:
        return step
    theta = flat_parameters(snapshot)
    with torch.no_grad():
        return proximal(snapshot, theta + step) - theta


def proximal_jacobian(snapshot: Snapshot) -> LinearOperator:
    """``D prox`` at the point where the optimizer's step ends, in float64, with its adjoint.

    One graph is differentiated once for an adjoint product, and twice for a forward one, as the adjoint is linear in
    what it is applied to. At a kink of the prox it is the derivative that autograd takes: of one side. Steps end there
    with probability 0, unless they do not move.

    Raises:
        Unmeasurable: a prox that autograd cannot differentiate, or whose derivative is not finite, as that of singular
            vectors where two singular values coincide.

    Cost: no gradient of the loss.
    """
    return snapshot.once("proximal jacobian", lambda: _jacobian(snapshot))


def _jacobian(snapshot: Snapshot) -> LinearOperator:
    with torch.no_grad():
        half = (flat_parameters(snapshot) + displacement(snapshot)).detach()
    with torch.enable_grad():
        half.requires_grad_()
        after = proximal(snapshot, half)
        if not after.requires_grad:
            raise Unmeasurable(
                "prox returns numbers without a graph (torch.no_grad, .data, numpy): write it in operations that "
                "autograd can differentiate"
            )
        D = jacobian(after, half)

    def finite(t: Tensor) -> Tensor:
        if not bool(torch.isfinite(t).all()):
            raise Unmeasurable(
                "the derivative of prox is not finite where the step ends (singular values that coincide, a norm at 0)"
            )
        return t

    return replace(D, apply=lambda v: finite(D @ v), adjoint=lambda w: finite(D.T @ w))


def update_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``D prox . A_t``: the derivative of the whole update, see `step_jacobian` and `proximal_jacobian`.

    The prox acts on the parameters' block; the optimizer's state does not feel it. Cost: one Hessian product.
    """
    return _mapped(snapshot, step_jacobian(snapshot, method=method))


def update_response(snapshot: Snapshot) -> LinearOperator:
    """As `step_response`, of the whole update: what a change of the step's gradient makes of parameters and state."""
    return _mapped(snapshot, step_response(snapshot))


def update_drift(snapshot: Snapshot) -> LinearOperator:
    """As `update_jacobian`, if the step's gradient did not change: what is left is due to the curvature.

    Cost: no gradient where the step has its own.
    """
    own = clipped_gradient(snapshot)
    tangent, size = step_tangent(snapshot)
    dtype = torch.promote_types(own.dtype, torch.float32)

    def drift(z: Tensor) -> Tensor:
        return tangent(z, z.new_zeros(len(own)))

    return _mapped(snapshot, LinearOperator((size, size), drift, dtype=dtype, device=own.device))


def _mapped(snapshot: Snapshot, step: LinearOperator) -> LinearOperator:
    """What the prox makes of the parameters' block, which comes first."""
    if snapshot.run.prox is None:
        return step
    D, n = proximal_jacobian(snapshot), sum(p.numel() for p in snapshot.parameters.values())

    def product(z: Tensor) -> Tensor:
        moved = step @ z
        return torch.cat([(D @ moved[:n]).to(moved), moved[n:]])

    def adjoint(w: Tensor) -> Tensor:
        return step.T @ torch.cat([(D.T @ w[:n]).to(w), w[n:]])

    known = None if step.adjoint is None else adjoint
    return LinearOperator(step.shape, product, known, dtype=step.dtype, device=step.device)


@dataclass(frozen=True)
class Expected:
    """Where a step should leave the parameters.

    Attributes:
        parameters: that the optimizer holds.
        after: their values, flat, in float64.
        distance: how far they move.
    """

    parameters: list[nn.Parameter]
    after: Tensor
    distance: float

    def met(self) -> bool:
        """Whether they are there now, to 0.1 % of the update, and its rounding; True where it is not finite."""
        if not math.isfinite(self.distance):  # one gradient with an infinity proves no other map
            return True
        now = flatten([p.detach().double() for p in self.parameters], self.parameters)
        rounding = 4 * torch.finfo(self.parameters[0].dtype).eps * float(torch.linalg.vector_norm(self.after))
        return float(torch.linalg.vector_norm(now - self.after)) <= 1e-3 * self.distance + rounding


def expected(snapshot: Snapshot) -> Expected:
    """What the step and the prox should make of the parameters; cost: see `displacement`."""
    move = update(snapshot)
    held = [group is not None for group in group_of(snapshot).values()]
    parameters = list(snapshot.parameters.values())
    parts = [part for part, own in zip(split(flat_parameters(snapshot) + move, parameters), held) if own]
    own = [p for p, held_too in zip(parameters, held) if held_too]
    return Expected(own, flatten(parts, own), float(torch.linalg.vector_norm(move)))


def flat_parameters(snapshot: Snapshot) -> Tensor:
    """theta, flat, in float64."""
    parameters = list(snapshot.parameters.values())
    return flatten([p.detach().double() for p in parameters], parameters)
