"""The Hessian of one step's loss as a linear operator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.difference_hessian import difference_hessian
from lsp_callbacks.operators.curvature.exact_hessian import exact_hessian, vector_dtype
from lsp_callbacks.operators.curvature.finite_differences import Differences
from lsp_callbacks.operators.curvature.gradient_difference import Products
from lsp_callbacks.operators.curvature.held_slopes import holds_kinks, with_held_slopes
from lsp_callbacks.operators.curvature.shard_hessian import shard_hessian
from lsp_callbacks.operators.divided_step import require_room
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.snapshot import Snapshot, computed_once

Method = Literal["auto", "exact", "finite_difference"]


def hessian(
    snapshot: Snapshot,
    *,
    method: Method = "auto",
    weight: Tensor | float | None = None,
    relative: bool = True,
    both: bool = False,
) -> LinearOperator:
    """Return ``v -> H v``, with ``H = d^2 L / d theta^2`` at the step's parameters, batch and random masks.

    ``"finite_difference"`` is ``(grad L(theta + e u) - g) / e`` along the unit vector ``u``, where g is the step's
    own gradient: one gradient for each product, on the path that training took, uncompiled. e scales with the
    parameters, and each product is checked: against the rounding of gradients and parameters, and by the trapezoidal
    rule, see `lsp_callbacks.operators.curvature.finite_differences.Differences`. Where a check fails, exact products
    take over for this step; they refuse replays that differ from the step. ``"exact"`` is reverse-over-reverse on one
    graph, right at any scale. ``"auto"``: see `decided`.

    Where the graph holds a ``torch.autograd.Function`` written by the user, or a kernel without a second derivative,
    exact products may raise or, worse, lack a part of H without an error. With such a function one of them is compared
    with a central difference (1 %); where exact products are wrong or raise, finite differences take over if the loss
    is smooth and nothing is rounded to half precision, and otherwise the step is refused.

    Where the loss depends on the parameters by way of tensors without a graph (the power iteration of
    ``torch.nn.utils.spectral_norm`` in training, ``detach``), training moves by a gradient whose change no second
    backward pass knows, and which is no symmetric matrix. There an exact product is compared in the same way, and the
    step is refused unless they agree.

    In half precision (bfloat16 parameters, or autocast) exact products carry its rounding, some 1 %; they are used
    nevertheless, in float32 vectors, and `path_taken` names the type.

    Args:
        snapshot: a step; ``gradient`` is needed for finite differences.
        method: see above.
        weight: what products will be multiplied by, one number or one for each parameter: differences are made as
            accurate as that needs.
        relative: False where ``weight * H u`` is added to the unit vector u.
        both: whether products are also used without the weight.

    Returns:
        A symmetric operator on the flat vector of the trainable parameters, ``(P,) -> (P,)``, at least float32.

    Raises:
        Unmeasurable: no trainable parameter; a loss that cannot be replayed, or not be differentiated twice.

    Under several ranks H is the Hessian of the mean of their losses: each product is the mean of the ranks' products
    with the same vector, and each check looks at such means.

    Cost: finite difference 1.2 gradients for each product, and one or two more in a step whose curvature is small; at
    kinks one forward pass, which notes the slopes; exact 3.3 for the first and 2 for each further one, both within
    40 %, and with custom functions 4 more for the comparison. Several ranks add an all-reduce of a gradient to each.
    """
    parameters = list(snapshot.parameters.values())
    if not parameters:
        raise Unmeasurable("no parameter requires a gradient: unfreeze some, or leave this quantity out")
    is_exact = decided(snapshot, method) == "exact" or bool(snapshot.graph.stopped)
    if snapshot.held is not None and snapshot.run.ranks.any_true(is_exact, "exact products"):
        raise Unsupported(
            "of shards there are products by differences alone, and this loss has kinks that cannot be held, is "
            "rounded to half precision or leaves its graph: allow a copy of the whole weights with max_memory=..."
        )
    if is_exact:
        return _exact(snapshot)
    if weight is not None:
        return _finite_difference(snapshot, weight=weight, relative=relative, both=both)
    return _unweighted_difference(snapshot)


def resolved(snapshot: Snapshot, method: Method) -> Method:
    """Return the method that a price assumes for ``"auto"``: that of `decided`, if all kinks that look so can be held.

    Cost: nothing.
    """
    if method != "auto":
        return method
    graph = snapshot.graph
    differences = snapshot.gradient is not None and graph.full and (not graph.kinked or holds_kinks(graph))
    return "finite_difference" if differences else "exact"


def decided(snapshot: Snapshot, method: Method) -> Method:
    """Return the method that ``"auto"`` stands for: finite differences where they are right, otherwise exact products.

    Finite differences need the step's gradient, full precision, and a loss without kinks: across the kink of a ReLU,
    the jump of the gradient over a small distance looks like a large curvature: up to 23 times the true sharpness in
    ``benchmarks/finite_differences_at_kinks.py``, where it is not checked. So activations keep the slopes of the step,
    see `lsp_callbacks.operators.curvature.held_slopes`; where there are kinks of other kinds, or kinks in activations
    that are checkpointed, products are exact.

    Cost: at kinks the forward pass that notes the slopes, once a step, which the products need.
    """
    decision = resolved(snapshot, method)
    is_free = method == "auto" and decision == "finite_difference" and snapshot.graph.kinked
    return "exact" if is_free and with_held_slopes(snapshot) is None else decision


def _smooth(snapshot: Snapshot) -> bool:
    return snapshot.graph.full and not snapshot.graph.kinked


def path_taken(snapshot: Snapshot, method: Method) -> str:
    """Return in words how the products of this step's `hessian` were computed, once there was one.

    "exact" or "finite difference"; then what had to be changed for it: "slopes held", "math attention", "uncompiled";
    then the type, where products are rounded to half precision.
    """
    is_exact, products = decided(snapshot, method) == "exact", products_so_far(snapshot)
    return (products.exact if is_exact else products.differences) or label("exact", snapshot)


def label(path: str, snapshot: Snapshot, dtype: torch.dtype | None = None) -> str:
    """Return a path with what `double_backward` has to change, and the type that products are rounded to."""
    dtype = dtype or snapshot.graph.dtype
    parts = {
        "math attention": snapshot.graph.fused and path == "exact",
        "uncompiled": snapshot.compiled,
        str(dtype).removeprefix("torch."): dtype.itemsize <= 2,
    }
    return ", ".join([path, *(part for part, holds in parts.items() if holds)])


def product_cost(method: Method, products: float) -> float:
    """Return the gradients that Hessian products on one step cost; see ``benchmarks/hessian_product_costs.py``."""
    return 1.2 * products if method == "finite_difference" else 3.3 + 2.0 * (products - 1)


@computed_once
def products_so_far(snapshot: Snapshot) -> Products:
    """Return the record of this step's products, which they update."""
    return Products()


@computed_once
def _exact(snapshot: Snapshot) -> LinearOperator:
    def differences(gradient: Tensor, reason: str) -> LinearOperator:
        """Take over where exact products are wrong, if differences can be trusted."""
        if not _smooth(snapshot):
            raise Unmeasurable(
                f"{reason}; finite differences cannot replace it, as the loss has kinks or is rounded to half "
                "precision: write backward functions in operations that can be differentiated, or leave this quantity "
                "out"
            )
        return _finite_difference(snapshot, gradient, alone=True)

    products_so_far(snapshot).exact = label("exact", snapshot)
    return exact_hessian(snapshot, differences)


#: Where `computed_once` keeps exact products, and the graph that they are made from; without it a further one is made.
EXACT = (_exact.__wrapped__, ())  # type: ignore[attr-defined]


@computed_once
def _unweighted_difference(snapshot: Snapshot) -> LinearOperator:
    return _finite_difference(snapshot)


def _finite_difference(
    snapshot: Snapshot,
    gradient: Tensor | None = None,
    *,
    alone: bool = False,
    weight: Tensor | float = 1.0,
    relative: bool = True,
    both: bool = False,
) -> LinearOperator:
    """Return products by differences from a gradient; ``alone``: there are no exact products to fall back on."""
    gradient = snapshot.flat_gradient if gradient is None else gradient
    if gradient is None:
        raise Unmeasurable("finite differences start from the step's gradient: pass gradient=... or method='exact'")
    held = with_held_slopes(snapshot) if snapshot.graph.kinked else None
    if snapshot.held is not None:
        products_so_far(snapshot).differences = label("finite difference, shards", snapshot)
        return shard_hessian(held or snapshot, products_so_far(snapshot), weight, relative=relative, both=both)
    differences = Differences(held or snapshot, gradient, weight, relative=relative, both=both)
    products = products_so_far(snapshot)
    path = label("finite difference, slopes held" if held else "finite difference", snapshot)
    if alone:
        products.exact = path
    else:
        products.differences = path

    def exact(v: Tensor) -> Tensor:
        require_room(snapshot)
        image = hessian(snapshot, method="exact").apply(v)
        products.differences = products.exact
        return image

    return difference_hessian(differences, products, None if alone else exact)


def per_parameter(values: list[float], snapshot: Snapshot) -> Tensor | float:
    """Return one number for each parameter tensor, spread over the flat vector; a float where all agree."""
    if len(set(values)) == 1:
        return values[0]
    parameters = list(snapshot.parameters.values())
    dtype = vector_dtype(parameters[0].dtype)
    spread = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    for part, value in zip(split(spread, parameters), values):
        part.fill_(value)
    return spread
