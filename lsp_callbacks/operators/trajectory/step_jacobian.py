"""The Jacobian of one optimizer step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.hessian import Method, hessian
from lsp_callbacks.operators.trajectory.formula_tangent import GRADIENT, THETA, formula_tangent
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_change, clipped_gradient
from lsp_callbacks.operators.trajectory.step_by_differences import difference_tangent, require_smooth
from lsp_callbacks.operators.trajectory.update_rules import formula, formula_of
from lsp_callbacks.step.players import require_one
from lsp_callbacks.step.snapshot import Snapshot

Path = Literal["exact", "finite_difference_of_step"]


def tangent_path(snapshot: Snapshot) -> Path:
    """Return how `step_jacobian` computes the derivative of the step's optimizer, without replaying anything.

    Raises:
        Unmeasurable: where it cannot.
    """
    optimizer = snapshot.require_optimizer()
    if formula_of(optimizer) is not None:
        formula(optimizer)
        return "exact"
    gradient = snapshot.gradient or {}
    require_smooth(
        optimizer, snapshot.generator("own step"), [(p, gradient.get(name)) for name, p in snapshot.parameters.items()]
    )
    return "finite_difference_of_step"


def step_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """Return ``A_t``, the derivative of one step of the real optimizer by its parameters and its state.

    The state is ``z = (v, s_1, ...)``: a displacement v of the parameters, then one block for each float tensor of the
    optimizer's state, see `state_blocks`, P numbers each. An optimizer without couplings is an elementwise map
    ``(theta, g, s) -> (theta', s')``, whose derivative is applied in closed form to ``(v, dg, ds)``, with ``dg = H v``
    after the derivative of the clipping, ``kappa (I - g g^T / ||g||^2) H v`` where it is by norm and active. Nothing is
    frozen. Parameters without a gradient, and those that the optimizer does not hold, stay as they are; a state
    tensor that does not exist before the step has no derivative. For nu = 0 see `update_rules.root`. What is done to
    the parameters after the step (`RunContext.prox`) is not part of it: see `proximal.update_jacobian`.

    Any other optimizer: see `step_by_differences.difference_tangent`; its blocks have sizes of their own.

    Args:
        snapshot: a step of one optimizer, before the update; for several see `multi_optimizer.joint_jacobian`.
        method: of the Hessian products.

    Returns:
        A square operator, with its adjoint where the optimizer has a formula, see `step_adjoint`.

    Raises:
        Unmeasurable: no optimizer, a step that is not supported, or one without a derivative.

    Cost: one Hessian product; none for ``v = 0``. A copy of parameters, gradient and state. Source: the formulas of
    torch.optim.
    """
    require_one(snapshot.player)
    optimizer = snapshot.require_optimizer()  # before anything is replayed
    H = accurate_hessian(snapshot, method)
    n = H.shape[0]
    tangent, size = step_tangent(snapshot)
    pull = _step_adjoint(snapshot) if formula_of(optimizer) is not None else None

    @functools.cache
    def transposed() -> LinearOperator:
        return hessian(snapshot, method="exact") if _reaches_where_nothing_pulls(snapshot) else H

    def adjoint(w: Tensor) -> Tensor:
        assert pull is not None
        z, change = pull(w)
        return torch.cat([z[:n] + transposed().apply(change), z[n:]])

    transpose = None if pull is None else adjoint
    return LinearOperator((size, size), lambda z: tangent(z, H.apply(z[:n])), transpose, dtype=H.dtype, device=H.device)


def accurate_hessian(snapshot: Snapshot, method: Method) -> LinearOperator:
    """Return the Hessian as accurate as the step's Jacobian needs it: Adam divides its errors by second moments, too.

    Without a formula, or through an orthogonalisation, the effect of rounding is unknown: ``"auto"`` is exact there.
    """
    rule = formula_of(snapshot.require_optimizer())
    if rule is None or rule.couples or method == "exact":
        return hessian(snapshot, method="exact" if method == "auto" else method)
    weight: Tensor | float
    if rule.second_moment is None:
        weight = max((float(group["lr"]) for group in snapshot.groups.values() if group), default=0.0)
    else:
        weight = _response(snapshot)
    return hessian(snapshot, method=method, weight=weight, relative=False)


def _reaches_where_nothing_pulls(snapshot: Snapshot) -> bool:
    """Return whether a preconditioner is largest where the gradient is exactly 0: dead units, tokens not yet seen.

    The transpose multiplies by it *before* the Hessian. Such numbers then are a million times the others, and what a
    difference of gradients along both together says of the others is rounding.
    """
    optimizer = snapshot.require_optimizer()
    if formula(optimizer).second_moment is None:
        return False
    reach, still = _response(snapshot), clipped_gradient(snapshot) == 0
    return bool(reach.where(still, 0.0).max() > reach.where(~still, 0.0).max())


def _response(snapshot: Snapshot) -> Tensor:
    """Return ``|d theta' / d g|`` of each parameter, without clipping."""
    like = clipped_gradient(snapshot)
    like = like.to(torch.promote_types(like.dtype, torch.float32))
    return formula_tangent(snapshot).reach(THETA, GRADIENT, like)


def step_response(snapshot: Snapshot) -> LinearOperator:
    """Return the derivative of one step of the real optimizer with respect to the gradient of its loss.

    If the gradient were ``g + dg``, the state after the step would differ by ``R dg``, to first order: clipping and
    formula are differentiated as in `step_jacobian`, at unchanged parameters and state. For plain SGD ``R = -lr``. A
    perturbation of the data that changes the gradients by ``dg_t`` moves the run by ``r' = A_t r + R_t dg_t``.

    Args:
        snapshot: a step, with its optimizer before the update.

    Returns:
        From ``(P,)`` to the state of `step_jacobian`.

    Raises:
        Unmeasurable: as `step_jacobian`.

    Cost: no gradient where the step has one, otherwise one.
    """
    gradient = clipped_gradient(snapshot)
    tangent, size = step_tangent(snapshot)
    dtype = torch.promote_types(gradient.dtype, torch.float32)

    def response(change: Tensor) -> Tensor:
        return tangent(change.new_zeros(size), change)

    pull = _step_adjoint(snapshot) if formula_of(snapshot.require_optimizer()) is not None else None
    transpose = None if pull is None else (lambda w: pull(w)[1])
    return LinearOperator((size, len(gradient)), response, transpose, dtype=dtype, device=gradient.device)


def step_tangent(snapshot: Snapshot) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Return ``(z, dg) -> z'``, the derivative of the optimizer's step alone, and the length of z.

    z is the state of `step_jacobian`; dg the change of the step's gradient, before clipping, whatever has caused it.

    Raises:
        Unmeasurable: as `step_jacobian`.

    Cost: no gradient where the step has one.
    """
    if formula_of(snapshot.require_optimizer()) is None:
        step, size = difference_tangent(snapshot, clipped_gradient(snapshot))
    else:
        tangent = formula_tangent(snapshot)
        step, size = tangent.push, tangent.size
    if snapshot.clipping is None:
        return step, size
    return lambda z, change: step(z, clipped_change(snapshot, change)), size


def step_adjoint(snapshot: Snapshot, w: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the transpose of `step_tangent` of an optimizer with a formula; return ``(z, dg)``, dg before clipping.

    Cost: no gradient where the step has one.
    """
    return _step_adjoint(snapshot)(w)


def _step_adjoint(snapshot: Snapshot) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    pull = formula_tangent(snapshot).pull
    if snapshot.clipping is None:
        return pull

    def clipped(w: Tensor) -> tuple[Tensor, Tensor]:
        z, change = pull(w)
        return z, clipped_change(snapshot, change)

    return clipped


def parameter_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """Return ``d theta' / d theta`` of one step, the optimizer's state held as it is before it.

    The parameters' block of `step_jacobian`; for SGD without momentum and clipping it is ``I - lr H'``.

    Raises:
        Unmeasurable: see `step_jacobian`; an optimizer without a formula.

    Cost: one Hessian product for each product.
    """
    formula(snapshot.require_optimizer())
    A = step_jacobian(snapshot, method=method)
    n = sum(p.numel() for p in snapshot.parameters.values())

    def block(of: LinearOperator) -> Callable[[Tensor], Tensor]:
        return lambda v: (of @ torch.cat([v, v.new_zeros(of.shape[1] - n)]))[:n]

    return LinearOperator((n, n), block(A), block(A.T), dtype=A.dtype, device=A.device)


def state_weight(snapshot: Snapshot) -> Tensor:
    """Return weights ``(1, r)`` of the norm ``||(v, r m)||``: a unit of the momentum buffer moves a parameter by r.

    r follows from the optimizer's step alone, also where no buffer exists yet, and at rate 0 from the group's
    ``initial_lr``: a weight without the units of the parameters would make the norm depend on their scale, and jump
    when the buffer appears.

    Args:
        snapshot: the step.

    Returns:
        ``(P,)``, or ``(2P,)`` where there is momentum: other state tensors have no part in the norm. r is 1 where a
        buffer would never move anything.

    Cost: no gradient.
    """
    optimizer = snapshot.require_optimizer()
    rule = formula_of(optimizer)
    like = clipped_gradient(snapshot)
    like = like.to(torch.promote_types(like.dtype, torch.float32))
    if rule is None or not any(map(rule.momentum, optimizer.param_groups)):
        return torch.ones_like(like)
    tangent = formula_tangent(snapshot, initialised=True)
    reach = tangent.reach(THETA, tangent.blocks[0], like)
    return torch.cat([torch.ones_like(like), torch.where(reach > 0, reach, 1.0)])
