"""How much one optimizer step can stretch a displacement of its parameters and state, from above."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, lanczos, norm_upper, operator_norm, spectrum_bounds
from lsp_callbacks.operators.formulas import formula_of
from lsp_callbacks.operators.frozen import buffer_rates, clip_factor, frozen_rule, rates, spread
from lsp_callbacks.operators.proximal import proximal_jacobian
from lsp_callbacks.operators.training import clipped_gradient, known_optimizer, state_blocks, step_diagonals
from lsp_callbacks.snapshot import Snapshot, Unmeasurable

#: Blocks of the state that hold squares of gradients.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def state_scale(snapshot: Snapshot) -> Tensor:
    """Positive weights of a norm of the state, 1 on the parameters: about how far a unit of each number moves them.

    r for a momentum, the rate that multiplies it in this step; ``r D / 2`` for a second moment, with D the
    preconditioner ``1 / sqrt(nu)``. Any weights give a norm; with these a bound by it is near the truth. 1 where
    nothing moves.

    Raises:
        Unmeasurable: an optimizer without a formula, or without a common rule; gradients that are not known; half
            precision, in which products are too coarse for a bound.
    """
    if formula_of(known_optimizer(snapshot)) is None:
        raise Unmeasurable(
            f"the step of {type(snapshot.optimizer).__name__} has no adjoint: it is known by differences only"
        )
    if not snapshot.graph.full:
        raise Unmeasurable("products in half precision are too coarse for a bound: train some steps in float32")
    like, rule = clipped_gradient(snapshot), frozen_rule(snapshot)
    factor = clip_factor(snapshot)
    unit, scale = rates(snapshot) / factor, spread(rule.scale, snapshot) / factor
    worth = {name: unit * scale / 2 for name in SQUARES} | {"grad_avg": unit}
    parts = [torch.ones_like(like)]
    for name in state_blocks(snapshot):
        r = torch.as_tensor(worth.get(name, buffer_rates(snapshot)), dtype=like.dtype, device=like.device)
        parts.append(torch.where((r > 0) & r.isfinite(), r, 1.0).expand_as(like))
    return torch.cat(parts)


def step_norm(
    snapshot: Snapshot,
    step: LinearOperator,
    scale: Tensor,
    *,
    products: int,
    failure: float,
    generator: torch.Generator,
) -> float:
    """``||W A W^-1||_2`` from above, except with probability ``failure``.

    Args:
        snapshot: a step.
        step: its A, see `update_jacobian`, with an adjoint.
        scale: the diagonal of W, see `state_scale`.
        products: Hessian products that Lanczos may take; one a step where A is symmetric, as that of plain SGD with
            one rate, otherwise two, on ``A^T A``, at least one pair.
        failure: see `lsp_callbacks.linalg.spectrum_bounds`.
        generator: of the start.

    Cost: ``products`` Hessian products.
    """
    if _symmetric(snapshot):
        start = torch.randn(step.shape[1], generator=generator, dtype=step.dtype).to(step.device)
        ritz = lanczos(step, start, steps=products, tol=0.0, ends=(0, -1))
        low, high = spectrum_bounds(ritz, failure=failure / 2)
        return float(torch.maximum(high, -low))

    weighted = LinearOperator(
        step.shape,
        lambda z: scale * (step @ (z / scale)),
        lambda w: (step.T @ (scale * w)) / scale,
        dtype=step.dtype,
        device=step.device,
    )
    found = operator_norm(weighted, steps=max(1, products // 2), tol=0.0, failure=failure, generator=generator).upper
    assert found is not None
    return float(found)


def basis_size(snapshot: Snapshot, products: int) -> int:
    """Vectors over all parameters that `step_norm` keeps."""
    blocks = 1 + len(state_blocks(snapshot))
    return products if not products or _symmetric(snapshot) else max(1, products // 2) * blocks


def response_size(snapshot: Snapshot, scale: Tensor, *, failure: float) -> float:
    """``||W B||_F^2 / P`` from above: how far, in the mean square, noise of variance 1 in the gradient moves the state.

    Clipping by norm is counted by its factor, which is right but for one direction; a prox by its norm.

    Cost: no gradient; products with a prox.
    """
    diagonals = step_diagonals(snapshot)[-1].double() * clip_factor(snapshot)
    blocks = (diagonals.flatten() * scale).view_as(diagonals).square().sum(1)
    if snapshot.prox is not None:
        blocks[0] *= float(norm_upper(proximal_jacobian(snapshot), failure=failure).clamp_min(0)) ** 2
    return float(blocks.sum()) / diagonals.shape[1]


def _symmetric(snapshot: Snapshot) -> bool:
    if state_blocks(snapshot) or snapshot.prox is not None:
        return False
    rate = step_diagonals(snapshot)[-1, 0]
    own = snapshot.flat_gradient
    clipped = snapshot.clipping is not None and (own is None or not torch.equal(clipped_gradient(snapshot), own))
    return not clipped and bool((rate == rate[0]).all())
