"""The Hessian of one step's loss as a linear operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.curvature.finite_differences import FIRST, Differences, Untrusted
from lsp_callbacks.step.snapshot import Snapshot, Unmeasurable, Unmodelled, flatten, split

Method = Literal["auto", "exact", "finite_difference"]


def hessian(
    snapshot: Snapshot, *, method: Method = "auto", weight: Tensor | float | None = None, relative: bool = True
) -> LinearOperator:
    """``H v``, with ``H = d^2 L / d theta^2`` at the step's parameters, batch and random masks.

    ``"finite_difference"`` is ``(grad L(theta + e u) - g) / e`` along the unit vector ``u``, where g is the step's
    own gradient: one gradient a product, on the path that training took, uncompiled. e scales with the parameters, and
    each product is checked: against the rounding of gradients and parameters, and by the trapezoidal rule, see
    `lsp_callbacks.operators.curvature.finite_differences.Differences`. Where a check fails the exact product takes over
    for this step, and refuses unfaithful replays. ``"exact"`` is reverse-over-reverse on one graph, right at any
    scale. ``"auto"``: see `resolved`.

    Where a ``torch.autograd.Function`` of the user's own, or a kernel without a second derivative, stands in the graph,
    exact products may raise or, worse, lack a part of H without a word. With such a function one of them is compared
    with a central difference (1 %); where exact products are wrong or raise, finite differences take over if the loss
    is smooth and nothing is rounded to half precision, and otherwise the step is refused.

    Where the loss depends on the parameters by way of tensors without a graph (the power iteration of
    ``torch.nn.utils.spectral_norm`` in training, ``detach``), training moves by a gradient whose change no second
    backward pass knows, and which is no symmetric matrix: compared with a central difference in the same way, and
    refused unless they agree.

    In half precision (bfloat16 parameters, or autocast) exact products carry its rounding, some 1 %; they are taken as
    they are, in float32 vectors, and `path_taken` names the type.

    Args:
        snapshot: a step; ``gradient`` is needed for finite differences.
        method: see above.
        weight: what products will be multiplied by, one number or one for each parameter: differences are as good as
            that needs.
        relative: False where ``weight * H u`` is added to the unit vector u.

    Returns:
        A symmetric operator on the flat vector of the trainable parameters, ``(P,) -> (P,)``, at least float32.

    Raises:
        Unmeasurable: no trainable parameter; the loss cannot be replayed, or not be differentiated twice.

    Under several ranks H is the Hessian of the mean of their losses: each product is the mean of the ranks' own, from
    the same vector, and so is what each check looks at.

    Cost: finite difference 1.2 gradients a product, and one or two more in a step whose curvature is small; exact 3.3
    for the first and 2 for each further one, both within 40 %, and with custom functions 4 more for the comparison.
    Several ranks add an all-reduce of a gradient to each.
    """
    parameters = list(snapshot.parameters.values())
    if not parameters:
        raise Unmeasurable("no parameter requires a gradient: unfreeze some, or leave this quantity out")
    method = resolved(snapshot, method)
    if snapshot.graph.stopped:
        snapshot.once("stop gradients", lambda: _refuse_stop_gradients(snapshot))
    if weight is not None and method == "finite_difference":
        return _finite_difference(snapshot, weight=weight, relative=relative)
    return snapshot.once(("hessian", method), lambda: _BUILD[method](snapshot))


def resolved(snapshot: Snapshot, method: Method) -> Method:
    """What ``"auto"`` stands for: finite differences where they are right, exact products elsewhere.

    Finite differences need the step's gradient, full precision, and a smooth loss: across the kink of a ReLU, the jump
    of the gradient over a small distance looks like a large curvature: up to 23 times the true sharpness in
    ``benchmarks/finite_differences_at_kinks.py``, where it is not checked.
    """
    if method != "auto":
        return method
    return "finite_difference" if snapshot.gradient is not None and _smooth(snapshot) else "exact"


def _smooth(snapshot: Snapshot) -> bool:
    return snapshot.graph.full and not snapshot.graph.kinked


def path_taken(snapshot: Snapshot, method: Method) -> str:
    """By which way the products of this step's `hessian` were found, once there was one.

    "exact" or "finite difference"; then what had to be changed for it: "math attention", "uncompiled"; then the type,
    where products are rounded to half precision.
    """
    return snapshot.memo.get(("path", resolved(snapshot, method)), "") or label("exact", snapshot)


def label(path: str, snapshot: Snapshot, dtype: torch.dtype | None = None) -> str:
    """Adds what `double_backward` has to change, and the type that products are rounded to."""
    dtype = dtype or snapshot.graph.dtype
    parts = {
        "math attention": snapshot.graph.fused and path == "exact",
        "uncompiled": snapshot.compiled,
        str(dtype).removeprefix("torch."): dtype.itemsize <= 2,
    }
    return ", ".join([path, *(part for part, holds in parts.items() if holds)])


def product_cost(method: Method, products: int) -> float:
    """Gradients that ``products`` Hessian products on one step cost; see ``benchmarks/hessian_product_costs.py``."""
    return 1.2 * products if method == "finite_difference" else 3.3 + 2.0 * (products - 1)


def _refuse_stop_gradients(snapshot: Snapshot) -> None:
    """Raise `Unmodelled` where the gradient changes with the parameters in ways that its graph does not know.

    Training moves by that gradient, so its derivative is the one that counts; it is no Hessian, and not symmetric.
    """
    names = ", ".join(snapshot.graph.stopped)
    reason = (
        f"the loss depends on the parameters by way of tensors without a graph (made by {names}; so do detach(), "
        "no_grad() and the power iteration of spectral_norm), "
    )
    what = "; leave this quantity out, or compute these tensors with a graph or from the data alone"
    if not snapshot.graph.full:
        raise Unmodelled(f"{reason}and whether that matters cannot be told in half precision{what}")
    product, own = snapshot.once("exact product", lambda: _exact_product(snapshot))
    if not _differentiated_twice(product, own, snapshot):
        raise Unmodelled(f"{reason}so that the change of its gradient is not what two backward passes say{what}")


def _exact_product(snapshot: Snapshot) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return ``v -> H v`` by a second backward pass, as autograd has it, and the gradient."""
    parameters = list(snapshot.parameters.values())
    dtype = snapshot.graph.dtype
    graph: list[Tensor] = []  # of the rank's own gradient

    def gradient() -> tuple[Tensor]:
        with double_backward(snapshot.module):
            loss = snapshot.replay()
            # Another path than the step's (no fused attention, not compiled): equal up to its rounding.
            snapshot.check(loss, tolerance=_path_tolerance(dtype))
            parts = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            graph.append(flatten(parts, parameters))
        return (graph[0].detach(),)

    (mean,) = snapshot.ranks.mean(gradient, "the gradient with its graph")
    snapshot.check_gradient(mean, tolerance=100 * _path_tolerance(dtype))
    own = mean.to(_vectors(mean.dtype))

    def exact(v: Tensor) -> Tensor:
        if not bool(v.any()):
            return torch.zeros_like(v)
        reasons: list[str] = []

        def product() -> tuple[Tensor, Tensor]:
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
            return flatten(parts, parameters).to(own.dtype), v.new_zeros(())

        found, raised = snapshot.ranks.mean(product, "the exact product")
        if raised > 0:
            raise _NoSecondDerivative(reasons[0] if reasons else "on another rank")
        return found

    return exact, own


def _exact(snapshot: Snapshot) -> LinearOperator:
    exact, own = snapshot.once("exact product", lambda: _exact_product(snapshot))

    def otherwise(reason: str) -> LinearOperator:
        """Differences from now on, where they can be trusted."""
        if not _smooth(snapshot):
            raise Unmeasurable(
                f"{reason}; finite differences are no way out where the loss has kinks or is rounded to half precision:"
                " write backward functions in operations that can be differentiated, or leave this quantity out"
            )
        return _finite_difference(snapshot, own, alone=True)

    snapshot.memo["path", "exact"] = label("exact", snapshot)
    names = " and ".join(snapshot.graph.custom)
    if names and not snapshot.graph.full:
        raise Unmeasurable(
            f"whether the backward of {names} can be differentiated cannot be told in half precision: train some steps "
            "in float32 to measure, or leave this quantity out"
        )
    if names and not _differentiated_twice(exact, own, snapshot):
        return otherwise(
            f"the derivative of the backward of {names} is not that of its gradients (once_differentiable, or detached "
            "tensors)"
        )

    def product(v: Tensor) -> Tensor:
        if "raises" not in snapshot.memo:
            try:
                return exact(v)
            except _NoSecondDerivative as error:
                snapshot.memo["raises"] = otherwise(f"the loss cannot be differentiated twice ({error})")
        return snapshot.memo["raises"] @ v

    return _symmetric(product, own)


class _NoSecondDerivative(Exception):
    """Some backward function has none."""


def _differentiated_twice(exact: Callable[[Tensor], Tensor], own: Tensor, snapshot: Snapshot) -> bool:
    """Whether one exact product is that of a central difference, at one of some distances: it may cross a kink.

    Where rounding hides the difference, those farther away have a say.
    """
    noise = torch.randn(len(own), generator=snapshot.generator("custom"), dtype=own.dtype).to(own.device)
    # The gradient leans towards what is sharp; noise sees the rest.
    v = (noise / norm(noise) + own / norm(own).clamp_min(torch.finfo(torch.float64).tiny)).to(own.dtype)
    v = (v / norm(v)).to(own.dtype)
    try:
        found = exact(v)
    except _NoSecondDerivative:
        return False

    def compared(far: float) -> _Look:
        central, distance = central_difference(snapshot, v, far)
        size, defect = float(norm(central)), float(norm(found - central))
        rounding = 4 * torch.finfo(own.dtype).eps * float(norm(own)) / distance
        agree = defect <= 0.01 * size + min(rounding, 0.02 * size)
        return _Look(central, defect, agree, rounding > 0.02 * size, max(size, float(norm(found))) <= rounding)

    first = compared(1.0)
    if first.agrees:
        return True
    before = first
    for far in (1 / 8, 1 / 64):
        look = compared(far)
        # Of a kink nothing would be left here, or eight times as much: what stays as it is lacks in the exact product.
        if not before.rounded and float(norm(look.central - before.central)) <= 0.5 * before.defect:
            return False
        if look.agrees:
            return True
        before = look
    if not first.rounded:
        return False
    if compared(8.0).agrees:
        return True
    farthest = compared(64.0)
    return farthest.agrees or farthest.lost


@dataclass(frozen=True)
class _Look:
    """An exact product against a central difference.

    Attributes:
        central: the difference.
        defect: norm of what it differs by.
        agrees: whether that is 1 %, or what rounding may have added.
        rounded: whether rounding matters.
        lost: whether all is rounding.
    """

    central: Tensor
    defect: float
    agrees: bool
    rounded: bool
    lost: bool


def central_difference(snapshot: Snapshot, v: Tensor, far: float) -> tuple[Tensor, float]:
    """Of the gradient along a unit vector, and the distance to either side: ``far`` times that of other differences.

    Cost: two gradients.
    """
    differences = Differences(snapshot, torch.zeros_like(v))
    distance = far * FIRST * (differences.reach(v) or differences.eps**0.5)
    ends = [differences.difference(v, 1.0, sign * distance).change for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * distance), distance


def _finite_difference(
    snapshot: Snapshot,
    own: Tensor | None = None,
    *,
    alone: bool = False,
    weight: Tensor | float = 1.0,
    relative: bool = True,
) -> LinearOperator:
    """Differences from the gradient ``own``; ``alone``: there is no exact product to go to."""
    own = snapshot.flat_gradient if own is None else own
    if own is None:
        raise Unmeasurable("finite differences start from the step's gradient: pass gradient=... or method='exact'")
    differences = Differences(snapshot, own, weight, relative=relative)
    key = ("path", "exact" if alone else "finite_difference")
    snapshot.memo[key] = label("finite difference", snapshot)

    def product(v: Tensor) -> Tensor:
        if not bool(v.any()):
            return torch.zeros_like(v)
        if "untrusted" in snapshot.memo and not alone:
            return exact(v)
        try:
            return differences.product(v)
        except Untrusted:
            if not alone:
                # Exact products are right at any scale; they tell a kink from a replay that is not the step, too.
                snapshot.memo["untrusted"] = True
                return exact(v)
        try:
            return differences.searched(v)
        except Untrusted as error:
            raise Unmeasurable(
                f"the loss cannot be differentiated twice, and {error}: write the backward of your function as the "
                "derivative of its forward, in operations that can be differentiated, or leave this quantity out"
            ) from None

    def exact(v: Tensor) -> Tensor:
        found = hessian(snapshot, method="exact") @ v
        snapshot.memo[key] = snapshot.memo["path", "exact"]
        return found

    return _symmetric(product, own)


_BUILD = {"exact": _exact, "finite_difference": _finite_difference}


def _symmetric(product, like: Tensor) -> LinearOperator:
    return LinearOperator((like.numel(), like.numel()), product, product, dtype=like.dtype, device=like.device)


def _vectors(dtype: torch.dtype) -> torch.dtype:
    """Vectors are never rounded to half precision: Lanczos could not keep them orthogonal."""
    return torch.promote_types(dtype, torch.float32)


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
    dtype = _vectors(parameters[0].dtype)
    like = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    for part, value in zip(split(like, parameters), values):
        part.fill_(value)
    return like
