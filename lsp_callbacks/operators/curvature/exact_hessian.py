"""Exact Hessian products, by differentiating the gradient of one replay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.gradients_with_graphs import GradientGraph, NoSecondDerivative
from lsp_callbacks.operators.curvature.second_derivative_check import hessian_agrees
from lsp_callbacks.step.snapshot import Snapshot


def exact_hessian(snapshot: Snapshot, otherwise: Callable[[Tensor, str], LinearOperator]) -> LinearOperator:
    """Return ``v -> H v`` by reverse-over-reverse on one graph, see `lsp_callbacks.operators.hessian`.

    Args:
        snapshot: a step.
        otherwise: from the mean gradient and a reason to the operator that takes over where exact products are wrong,
            or raise.

    Raises:
        Unmeasurable: a replay that is not the step; custom functions in half precision, which cannot be checked.
        Unsupported: a loss that depends on the parameters by way of tensors without a graph.
    """
    gradients = GradientGraph(snapshot)
    gradient = gradients.mean.to(vector_dtype(gradients.mean.dtype))

    def exact(v: Tensor) -> Tensor:
        return gradients.product(v).to(gradient.dtype)

    names = " and ".join(snapshot.graph.custom)
    if names and not snapshot.graph.full:
        raise Unmeasurable(
            f"whether the backward of {names} can be differentiated cannot be checked in half precision: train some "
            "steps in float32 to measure, or leave this quantity out"
        )
    if names and not _confirmed(exact, gradient, snapshot):
        return otherwise(
            gradient,
            f"the derivative of the backward of {names} is not that of its gradients (once_differentiable, or detached "
            "tensors)",
        )

    # Of a game, only the player's own rows enter its step: `joint_jacobian` compares those.
    is_game = snapshot.player is not None and snapshot.player.joint
    if snapshot.graph.stopped and not is_game:
        _check_stop_gradients(exact, gradient, snapshot)

    fallback: LinearOperator | None = None  # once exact products have raised

    def product(v: Tensor) -> Tensor:
        nonlocal fallback
        if fallback is None:
            try:
                return exact(v)
            except NoSecondDerivative as error:
                fallback = otherwise(gradient, f"the loss cannot be differentiated twice ({error})")
        return fallback @ v

    return LinearOperator((len(gradient),) * 2, product, product, dtype=gradient.dtype, device=gradient.device)


def _check_stop_gradients(exact: Callable[[Tensor], Tensor], gradient: Tensor, snapshot: Snapshot) -> None:
    """Refuse a step whose gradient changes with the parameters in ways that its graph does not know.

    Raises:
        Unsupported: unless an exact product is the change of the gradient, to 1 %.
    """
    reason = (
        "the loss depends on the parameters by way of tensors without a graph, made by "
        f"{', '.join(snapshot.graph.stopped)} (so are those of detach(), no_grad() and the power iteration of "
        "spectral_norm), "
    )
    advice = "; leave this quantity out, or compute these tensors with a graph or from the data alone"
    if not snapshot.graph.full:
        raise Unsupported(f"{reason}and whether that matters cannot be checked in half precision{advice}")
    if not _confirmed(exact, gradient, snapshot):
        raise Unsupported(f"{reason}so that its gradient does not change as two backward passes say{advice}")


def _confirmed(exact: Callable[[Tensor], Tensor], gradient: Tensor, snapshot: Snapshot) -> bool:
    try:
        return hessian_agrees(exact, gradient, snapshot)
    except NoSecondDerivative:
        return False


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of vectors, never half precision: Lanczos could not keep them orthogonal."""
    return torch.promote_types(dtype, torch.float32)
