"""The Hessian of one step's loss as a linear operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.snapshot import Snapshot, Unmeasurable, displaced, flatten, split

Method = Literal["auto", "exact", "finite_difference"]


def hessian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``H v``, with ``H = d^2 L / d theta^2`` at the step's parameters, batch and random masks.

    ``"finite_difference"`` is ``(grad L(theta + e u) - g) / e`` along the unit vector ``u``, where g is the step's
    own gradient: one gradient a product, on the very path that training took. ``e = 8.7 sqrt(machine epsilon)`` (3e-3
    in float32) balances the third derivative against rounding; the error is about 0.1 % of ``||H||`` for smooth
    losses. Each product is checked by the trapezoidal rule; where that fails the exact product takes over for this
    step, and refuses unfaithful replays. ``"exact"`` is reverse-over-reverse on one graph. ``"auto"``: see `resolved`.

    Args:
        snapshot: a step; ``gradient`` is needed for finite differences.
        method: see above.

    Returns:
        A symmetric operator on the flat vector of the trainable parameters, ``(P,) -> (P,)``.

    Raises:
        Unmeasurable: no trainable parameter; or the loss cannot be replayed.

    Under several ranks H is the Hessian of the mean of their losses: each product is the mean of the ranks' own, from
    the same vector, and so is what each check looks at.

    Cost: finite difference 1.2 gradients a product; exact 3.3 for the first and 2 for each further one. Several ranks
    add an all-reduce of a gradient to each.
    """
    parameters = list(snapshot.parameters.values())
    if not parameters:
        raise Unmeasurable("no parameter requires a gradient: unfreeze some, or leave this quantity out")
    method = resolved(snapshot, method)
    return snapshot.once(("hessian", method), lambda: _BUILD[method](snapshot))


def resolved(snapshot: Snapshot, method: Method) -> Method:
    """What ``"auto"`` stands for: finite differences where they are right, exact products elsewhere.

    Finite differences need the step's gradient, full precision, and a smooth loss: across the kink of a ReLU, the jump
    of the gradient over a small distance looks like a large curvature: up to 9 times the true sharpness in
    ``benchmarks/finite_differences_at_kinks.py``.
    """
    if method != "auto":
        return method
    parameters = list(snapshot.parameters.values())
    full = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
    autocast = torch.is_autocast_enabled(parameters[0].device.type)
    smooth = snapshot.gradient is not None and full and not autocast and not snapshot.kinked
    return "finite_difference" if smooth else "exact"


def product_cost(method: Method, products: int) -> float:
    """Gradients that ``products`` Hessian products on one step cost; measured in ``benchmarks/``."""
    return 1.2 * products if method == "finite_difference" else 3.3 + 2.0 * (products - 1)


def _exact(snapshot: Snapshot) -> LinearOperator:
    parameters = list(snapshot.parameters.values())
    graph: list[Tensor] = []  # of the rank's own gradient

    def gradient() -> tuple[Tensor]:
        with double_backward(snapshot.module):
            loss = snapshot.replay()
            # Another path than the step's (no fused attention, not compiled): equal up to its rounding.
            snapshot.check(loss, tolerance=_path_tolerance(parameters[0].dtype))
            parts = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            graph.append(flatten(parts, parameters))
        return (graph[0].detach(),)

    (mean,) = snapshot.ranks.mean(gradient, "the gradient with its graph")
    snapshot.check_gradient(mean, tolerance=100 * _path_tolerance(mean.dtype))

    def product(v: Tensor) -> Tensor:
        if not bool(v.any()):
            return torch.zeros_like(v)

        def own() -> tuple[Tensor]:
            if not graph[0].requires_grad:  # a loss linear in the parameters has no graph left
                return (torch.zeros_like(v),)
            with double_backward(snapshot.module):
                parts = torch.autograd.grad(graph[0], parameters, v, retain_graph=True, materialize_grads=True)
            return (flatten(parts, parameters),)

        return snapshot.ranks.mean(own, "the exact product")[0]

    return _symmetric(product, mean)


def _finite_difference(snapshot: Snapshot) -> LinearOperator:
    own = snapshot.flat_gradient
    if own is None:
        raise Unmeasurable("finite differences start from the step's gradient: pass gradient=... or method='exact'")
    parameters = list(snapshot.parameters.values())
    precision = torch.finfo(own.dtype).eps
    distance = 8.7 * precision**0.5

    def product(v: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0.0:
            return torch.zeros_like(v)
        if "kink" in snapshot.memo:
            return hessian(snapshot, method="exact") @ v

        def displace() -> tuple[Tensor, Tensor, Tensor]:
            with displaced(parameters, v, distance / norm), torch.enable_grad():
                loss = snapshot.replay()
                moved = flatten(torch.autograd.grad(loss, parameters, materialize_grads=True), parameters)
            before = loss.detach() if snapshot.loss is None else snapshot.loss
            return moved, loss.detach() - before, before.abs()

        moved, rise, size = snapshot.ranks.mean(displace, "the displaced gradient")
        change = (moved - own) / distance
        if snapshot.loss is not None:
            # The trapezoidal rule, L(theta + e u) - L = e (g + g') u / 2, holds to O(e^3) on a smooth loss that was
            # replayed faithfully. The step's own loss and gradient are known, so both are checked for nothing.
            mean_slope = torch.dot(own + moved, v) / (2 * norm)
            defect = rise - distance * mean_slope
            rounding = 4 * precision * size
            if not bool(defect.abs() <= rounding + 0.05 * distance * (torch.dot(moved - own, v) / norm).abs()):
                # A hidden kink was crossed, or the replay is not the step: the exact product tells them apart.
                snapshot.memo["kink"] = True
                return hessian(snapshot, method="exact") @ v
        return change * norm

    return _symmetric(product, own)


_BUILD = {"exact": _exact, "finite_difference": _finite_difference}


def _symmetric(product, like: Tensor) -> LinearOperator:
    return LinearOperator((like.numel(), like.numel()), product, product, dtype=like.dtype, device=like.device)


def _path_tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)


@contextlib.contextmanager
def double_backward(module: nn.Module) -> Iterator[None]:
    """The kernels that can be differentiated twice: math attention, no compilation, no cuDNN recurrence."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def per_parameter(values: list[float], snapshot: Snapshot) -> Tensor | float:
    """One number for each trainable parameter tensor, spread over the flat vector; a float where all agree."""
    if len(set(values)) == 1:
        return values[0]
    parameters = list(snapshot.parameters.values())
    like = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for part, value in zip(split(like, parameters), values):
        part.fill_(value)
    return like
