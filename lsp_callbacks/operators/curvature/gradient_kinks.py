"""Kinks of a Lipschitz training map: second derivatives of the loss that jump, and slopes of a prox that jump."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.autograd.graph import kinks_between
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.clarke_training import UncertainSlopes
from lsp_callbacks.operators.trajectory.proximal import proximal
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.replay_checks import check_loss
from lsp_callbacks.step.snapshot import Snapshot

_LOSSES = {F.huber_loss: "delta", F.smooth_l1_loss: "beta"}
_ACTIVATIONS = {F.elu: "alpha", F.celu: "alpha"}
#: Backward nodes of functions whose gradient is continuous, and has a kink.
_SMOOTH_KINKS = ("HuberLoss", "SmoothL1Loss")


class _Calls(TorchFunctionMode):
    """Records the elementwise functions of a loss whose second derivative jumps."""

    def __init__(self) -> None:
        super().__init__()
        #: Input, value by element, distance to the kink, jump of the second derivative, the function.
        self.seen: list[tuple[Tensor, Tensor, Tensor, float, Callable[[Tensor], Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _LOSSES:
            return self._loss(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        if func in _ACTIVATIONS or name in ("selu", "elu_", "celu_", "selu_"):
            return self._unit(func, args, kwargs)
        return func(*args, **kwargs)

    def _loss(self, func: Any, given: dict[str, Any]) -> Tensor:
        at = float(given.get(_LOSSES[func], 1.0))
        legacy = any(given.get(name) is not None for name in ("size_average", "reduce", "weight"))
        if not at > 0 or legacy:
            raise Unmeasurable(
                f"{func.__name__} with {_LOSSES[func]}={at:g}, weight, size_average or reduce is not supported: pass a "
                f"{_LOSSES[func]} above 0 (at 0 the gradient jumps), and reduction=... alone"
            )
        r = torch.sub(*torch.broadcast_tensors(given["input"], given["target"]))

        def phi(x: Tensor) -> Any:
            return func(x, torch.zeros_like(x), reduction="none", **{_LOSSES[func]: at})

        value = phi(r)
        if r.requires_grad:
            self.seen.append((r, value, (r.detach().abs() - at).abs(), 1.0 if func is F.huber_loss else 1 / at, phi))
        reduction = given.get("reduction", "mean")
        return value if reduction == "none" else getattr(value, reduction)()

    def _unit(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        name = getattr(func, "__name__", "")
        given: dict[str, Any] = {"inplace": True}
        if func in _ACTIVATIONS:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
        alpha = float(given.get("alpha", 1.0))
        if given.get("inplace") or (func is F.elu and alpha != 1.0):
            raise Unmeasurable(
                f"{name} has a gradient that jumps (selu, elu with alpha other than 1), or works in place: a training "
                "map that jumps has no generalized Jacobian; use elu or celu, not in place"
            )
        z: Tensor = given["input"]
        value = func(z, alpha)
        if z.requires_grad:
            self.seen.append((z, value, z.detach().abs(), 1 / alpha, lambda x: func(x, alpha)))
        return value


def loss_kinks(snapshot: Snapshot, *, eps: float) -> UncertainSlopes:
    """Return the units of a loss whose second derivative jumps near their input.

    With ``w_i = dL / d phi_i`` of an elementwise function ``phi_i(z_i)`` whose second derivative jumps by j, the
    Hessian jumps by ``w_i j a_i a_i^T``, ``a_i = d z_i / d theta``, and by nothing else: `UncertainSlopes` holds
    ``a_i`` and ``w_i j``. Such functions are ``huber_loss``, ``smooth_l1_loss`` (of the residuals), ``elu`` and
    ``celu``. Kinks that are written with ``torch.where`` are not seen.

    Args:
        snapshot: a step.
        eps: units this near to the kink, as a multiple of the root mean square of the call's inputs.

    Raises:
        Unmeasurable: a loss whose gradient jumps: the training map is not continuous; several processes.

    Cost: a replay with its gradient, and a backward pass for each unit that is near.
    """
    parameters = list(snapshot.parameters.values())
    if snapshot.run.ranks.world > 1:
        raise Unmeasurable("kinks of the loss cannot be measured on several processes: measure with one process")
    with double_backward(snapshot.module), _Calls() as calls:
        loss = snapshot.replay()
    check_loss(snapshot, loss, tolerance=1e-10 if loss.dtype == torch.float64 else 1e-4)
    jumps = [name for name in kinks_between(loss, parameters) if not name.startswith(_SMOOTH_KINKS)]
    if jumps:
        raise Unmeasurable(
            f"the gradient jumps at the kinks of {' and '.join(jumps)}, and with it the training map "
            "theta -> theta - lr grad L, which has no generalized Jacobian: use smooth activations (tanh, GELU, ELU) "
            "and a smooth or Huber loss, or measure the forward pass only (clarke_profile)"
        )
    rows, jump, above = [], [], []
    for z, value, distance, size, phi in calls.seen:
        near = (distance <= eps * z.detach().square().mean().sqrt()).nonzero()
        if not len(near):
            continue
        (weight,) = torch.autograd.grad(loss, value, retain_graph=True, materialize_grads=True)
        curvature = _second(phi, z.detach())
        for place in map(tuple, near.tolist()):
            with torch.enable_grad():
                number = z[place]
            parts = torch.autograd.grad(number, parameters, retain_graph=True, materialize_grads=True)
            rows.append(flatten(parts, parameters).double())
            jump.append(weight[place].detach().double() * size)
            above.append((curvature[place].double() / size).clamp(0, 1))
    return _slopes(rows, jump, above, sum(p.numel() for p in parameters))


def prox_kinks(snapshot: Snapshot, *, eps: float) -> UncertainSlopes:
    """Return the coordinates in which the slope of a prox jumps near the point where the optimizer's step ends.

    The slopes of an elementwise map are compared on either side.

    Args:
        snapshot: a step.
        eps: distance to either side, as a multiple of the root mean square of the step.

    Raises:
        Unmeasurable: a prox without the attribute ``elementwise = True``.

    Cost: no gradient.
    """
    parameters = list(snapshot.parameters.values())
    size = sum(p.numel() for p in parameters)
    if snapshot.run.prox is None:
        return _slopes([], [], [], size)
    if not getattr(snapshot.run.prox, "elementwise", False):
        raise Unmeasurable(
            f"the points where the derivative of {snapshot.run.prox!r} jumps are unknown: give it the attribute "
            "elementwise = True if it maps each number by itself (as Box, SoftThreshold, Ridge, and Only of them), or "
            "leave clarke_training out"
        )
    step = displacement(snapshot)
    end = flatten([p.detach().double() for p in parameters], parameters) + step
    gap = eps * step.square().mean().sqrt()
    left, at, right = (_slope(snapshot, end + shift) for shift in (-gap, 0.0 * gap, gap))
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    near = (high > low).nonzero()[:, 0].tolist()
    unit = torch.eye(size, dtype=torch.float64, device=end.device) if near else end
    above = [((at[j] - low[j]) / (high[j] - low[j])).clamp(0, 1) for j in near]
    return _slopes([unit[j] for j in near], [high[j] - low[j] for j in near], above, size)


def _slope(snapshot: Snapshot, theta: Tensor) -> Tensor:
    """Return the diagonal of the derivative of an elementwise prox."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(proximal(snapshot, theta).sum(), theta)
    return slope


def _second(phi: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the second derivative of an elementwise function, on the side that autograd takes at a kink."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        (first,) = torch.autograd.grad(phi(at).sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), at, materialize_grads=True)
    return second


def _slopes(rows: list[Tensor], jump: list[Tensor], above: list[Tensor], size: int) -> UncertainSlopes:
    if not rows:
        none = torch.zeros(0, dtype=torch.float64)
        return UncertainSlopes(none.new_zeros(0, size), none, none)
    return UncertainSlopes(*(torch.stack(part).detach().cpu() for part in (rows, jump, above)))
