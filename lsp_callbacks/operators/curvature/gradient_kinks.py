"""Where a training map that is Lipschitz has kinks: second derivatives of the loss that jump, and slopes of a prox."""

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
from lsp_callbacks.functional.trajectory.clarke_training import UncertainSlopes
from lsp_callbacks.operators.trajectory.proximal import proximal
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.step.snapshot import Snapshot, Unmeasurable, flatten

_LOSSES = {F.huber_loss: "delta", F.smooth_l1_loss: "beta"}
_UNITS = {F.elu: "alpha", F.celu: "alpha"}
#: Of autograd's nodes: kinks whose gradient is continuous.
_BENDS = ("HuberLoss", "SmoothL1Loss")


class _Calls(TorchFunctionMode):
    """Sees the elementwise functions of a loss whose second derivative jumps."""

    def __init__(self) -> None:
        super().__init__()
        #: Input, value by element, distance to the kink, jump of the second derivative, the function.
        self.seen: list[tuple[Tensor, Tensor, Tensor, float, Callable[[Tensor], Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _LOSSES:
            return self._loss(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        if func in _UNITS or name in ("selu", "elu_", "celu_", "selu_"):
            return self._unit(func, args, kwargs)
        return func(*args, **kwargs)

    def _loss(self, func: Any, given: dict[str, Any]) -> Tensor:
        at = float(given.get(_LOSSES[func], 1.0))
        legacy = any(given.get(name) is not None for name in ("size_average", "reduce", "weight"))
        if not at > 0 or legacy:
            raise Unmeasurable(
                f"{func.__name__} with {_LOSSES[func]}={at:g}, weights, size_average or reduce is not modelled: with "
                "beta=0 its gradient jumps; otherwise give a reduction"
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
        if func in _UNITS:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
        alpha = float(given.get("alpha", 1.0))
        if given.get("inplace") or (func is F.elu and alpha != 1.0):
            raise Unmeasurable(
                f"{name} has a gradient that jumps (selu, elu with alpha other than 1), or works in place: Clarke's "
                "calculus does not cover a training map that jumps; use elu or celu, not in place"
            )
        z: Tensor = given["input"]
        value = func(z, alpha)
        if z.requires_grad:
            self.seen.append((z, value, z.detach().abs(), 1 / alpha, lambda x: func(x, alpha)))
        return value


def loss_kinks(snapshot: Snapshot, *, eps: float) -> UncertainSlopes:
    """The units of a loss whose second derivative jumps within ``eps`` of where they are.

    With ``w_i = dL / d phi_i`` of an elementwise function ``phi_i(z_i)`` whose second derivative jumps by j, the
    Hessian jumps by ``w_i j a_i a_i^T``, ``a_i = d z_i / d theta``, and by nothing else: `UncertainSlopes` holds
    ``a_i`` and ``w_i j``. Such functions are ``huber_loss``, ``smooth_l1_loss`` (of the residuals), ``elu`` and
    ``celu``. Near is within ``eps`` times the root mean square of the call's inputs. What is written with
    ``torch.where`` is not seen.

    Raises:
        Unmeasurable: a loss whose gradient jumps: the training map is not continuous; several processes.

    Cost: a replay with its gradient, and a backward pass for each unit that is near.
    """
    parameters = list(snapshot.parameters.values())
    if snapshot.run.ranks.world > 1:
        raise Unmeasurable("the kinks of several processes' losses are not modelled: measure with one process")
    with double_backward(snapshot.module), _Calls() as calls:
        loss = snapshot.replay()
    snapshot.check(loss, tolerance=1e-10 if loss.dtype == torch.float64 else 1e-4)
    jumps = [name for name in kinks_between(loss, parameters) if not name.startswith(_BENDS)]
    if jumps:
        raise Unmeasurable(
            f"the gradient jumps at the kinks of {' and '.join(jumps)}, and with it the training map "
            "theta -> theta - lr grad L: it is not Lipschitz, and Clarke's calculus covers the path forward only "
            "(clarke_profile); where activations are smooth (tanh, GELU, ELU) and the loss is Huber-like it does"
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
                one = z[place]
            parts = torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True)
            rows.append(flatten(parts, parameters).double())
            jump.append(weight[place].detach().double() * size)
            above.append((curvature[place].double() / size).clamp(0, 1))
    return _slopes(rows, jump, above, sum(p.numel() for p in parameters))


def prox_kinks(snapshot: Snapshot, *, eps: float) -> UncertainSlopes:
    """The numbers of a prox whose slope jumps within ``eps`` of where the optimizer's step ends.

    Of elementwise maps: the slopes on either side, ``eps`` of the root mean square of the step away.

    Raises:
        Unmeasurable: a prox that does not say that it is ``elementwise``.

    Cost: no gradient.
    """
    parameters = list(snapshot.parameters.values())
    size = sum(p.numel() for p in parameters)
    if snapshot.run.prox is None:
        return _slopes([], [], [], size)
    if not getattr(snapshot.run.prox, "elementwise", False):
        raise Unmeasurable(
            f"where the derivative of {snapshot.run.prox!r} jumps is known for maps of each number by itself (Box, "
            "SoftThreshold, Ridge, Only of them, and what says elementwise = True): leave clarke_training out"
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
    """The diagonal of the derivative of an elementwise prox."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        (found,) = torch.autograd.grad(proximal(snapshot, theta).sum(), theta)
    return found


def _second(phi: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The second derivative of an elementwise function, as autograd takes it."""
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
