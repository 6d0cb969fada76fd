"""Exact Hessian products, by differentiating the gradient of one replay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.curvature.second_derivative_check import hessian_agrees
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.replay_checks import check_gradient, check_loss
from lsp_callbacks.step.snapshot import Snapshot


class NoSecondDerivative(Exception):
    """A backward function without a derivative."""


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
    parameters = list(snapshot.parameters.values())
    dtype = snapshot.graph.dtype
    graph: list[Tensor] = []  # of this rank's gradient

    def rank_gradient() -> tuple[Tensor]:
        with double_backward(snapshot.module):
            loss = snapshot.replay()
            # Another path than the step's (no fused attention, not compiled): equal up to its rounding.
            check_loss(snapshot, loss, tolerance=_path_tolerance(dtype))
            parts = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            graph.append(flatten(parts, parameters))
        return (graph[0].detach(),)

    (mean,) = snapshot.run.ranks.mean(rank_gradient, "the gradient with its graph")
    check_gradient(snapshot, mean, tolerance=100 * _path_tolerance(dtype))
    gradient = mean.to(vector_dtype(mean.dtype))

    def exact(v: Tensor) -> Tensor:
        if float(norm(v)) == 0:
            return torch.zeros_like(v)
        reasons: list[str] = []

        def rank_product() -> tuple[Tensor, Tensor]:
            if not graph[0].requires_grad:  # a loss linear in the parameters has no graph left
                return torch.zeros_like(v), v.new_zeros(())
            try:
                with double_backward(snapshot.module):
                    parts = torch.autograd.grad(
                        graph[0], parameters, v.to(graph[0].dtype), retain_graph=True, materialize_grads=True
                    )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # no second derivative is implemented
                reasons.append(str(error))
                return torch.zeros_like(v), v.new_ones(())
            return flatten(parts, parameters).to(gradient.dtype), v.new_zeros(())

        image, raised = snapshot.run.ranks.mean(rank_product, "the exact product")
        if raised > 0:
            raise NoSecondDerivative(reasons[0] if reasons else "on another rank")
        return image

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


def _path_tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
