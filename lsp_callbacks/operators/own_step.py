"""The derivative of a step whose formula is not known: finite differences of the optimizer's own ``step`` on copies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lsp_callbacks.operators.optimizer_copy import OptimizerCopy
from lsp_callbacks.replay import RandomState
from lsp_callbacks.snapshot import Snapshot, Unmeasurable, split

#: Relative distance of the central differences, in float64: their error is about 1e-9 where the step is smooth.
DISTANCE = 1e-5

#: ``(z, dg) -> z'``.
Tangent = Callable[[Tensor, Tensor], Tensor]


def own_step_tangent(snapshot: Snapshot, gradient: Tensor) -> tuple[Tangent, int]:
    """The derivative of the step of an optimizer without a formula, by central differences of its own ``step``.

    ``(step(z_0 + e z, g + e dg) - step(z_0 - e z, g - e dg)) / 2 e`` on deep copies of the optimizer in float64, e
    small against parameters, gradient and state alike. The state is ``z = (v, s)``: a displacement of the parameters,
    then each float tensor of the optimizer's state by parameter and name, in its own shape. Counters and numbers
    (shape ``()``) are not part of it. Random numbers that the step draws are the same in both copies.

    Args:
        snapshot: a step, with its optimizer before the update.
        gradient: what the optimizer sees, flat.

    Returns:
        ``(z, dg) -> z'``, and the length of z.

    Raises:
        Unmeasurable: if the optimizer cannot be copied, needs a closure, or its state changes shape.

    Cost: two optimizer steps in double precision, on copies of parameters and state.
    """
    optimizer = snapshot.optimizer
    assert optimizer is not None
    parameters = list(snapshot.parameters.values())
    moved = [snapshot.gradient is None or snapshot.gradient[name] is not None for name in snapshot.parameters]
    g, n = gradient.double(), gradient.numel()
    random_state = RandomState()

    def stepped(displaced: Callable[[OptimizerCopy], None], gradient: Tensor) -> OptimizerCopy:
        own = OptimizerCopy(optimizer, parameters)
        displaced(own)
        own.step([part if moves else None for moves, part in zip(moved, split(gradient, parameters))], random_state)
        return own

    layout = stepped(lambda own: None, g).layout()
    start = OptimizerCopy(optimizer, parameters).read(layout)
    blocks = [n, *(torch.Size(shape).numel() for _, _, shape in layout)]

    def tangent(z: Tensor, change: Tensor) -> Tensor:
        z, dg = z.double(), change.double()
        pairs = zip((*start.split(blocks), g), (*z.split(blocks), dg))
        e = DISTANCE * min((_ratio(x, dx) for x, dx in pairs if bool(dx.any())), default=1.0)

        def end(s: float) -> Tensor:
            return stepped(lambda own: own.displace(layout, s * z), g + s * dg).read(layout)

        return ((end(e) - end(-e)) / (2 * e)).to(gradient.dtype)

    return tangent, len(start)


def _ratio(x: Tensor, dx: Tensor) -> float:
    """How often a tangent fits into what it displaces; a tensor that is 0 has no size of its own."""
    size, change = (float(torch.linalg.vector_norm(t)) for t in (x, dx))
    return (size or 1.0) / change


def require_smooth(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Refuses an optimizer whose step has no derivative that means something; on copies, with random gradients.

    Raises:
        Unmeasurable: two-step optimizers (SAM), those that need a closure (LBFGS), state that is not made of float
            tensors, sign-based updates (a small relative change of the gradient does not change them), and updates that
            are rounded (the response to a small change is not proportional to it).

    Cost: seven steps on copies, no gradient.
    """
    kind = type(optimizer).__name__
    parameters = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters
    closure = parameters.get("closure")
    if hasattr(optimizer, "first_step"):
        raise Unmeasurable(f"{kind} makes its step out of two gradients: its update is not modelled")
    if isinstance(optimizer, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise Unmeasurable(f"{kind} evaluates the loss several times in a step (closure): its update is not modelled")

    try:
        own, random_state = OptimizerCopy(optimizer), RandomState()
    except Exception as error:  # no memory, or what the user's optimizer raises
        raise Unmeasurable(f"{kind} cannot be copied ({type(error).__name__}: {error}): it has no derivative") from None
    for group in own.optimizer.param_groups:
        group["lr"] = group.get("lr") or 1e-3  # at rate 0 nothing could be seen
    # The second step: in its first one even Adam's update is a sign.
    first = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in own.twins]
    uniform = [torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in own.twins]
    sign = [torch.randint(0, 2, p.shape, generator=generator).to(p.device) * 2.0 - 1 for p in own.twins]
    try:
        own.step(first, random_state)
        _refuse_hidden_state(own)
        before = own.read([])

        def update(distance: float) -> Tensor:
            twin = OptimizerCopy(own.optimizer)
            twin.step([g * s * (0.5 + u) * (1 + distance * s) for g, u, s in zip(first, uniform, sign)], random_state)
            return twin.read([]) - before

        plain = update(0.0)
        size, changed = float(plain.square().mean().sqrt()), float(((update(0.1) - plain) != 0).double().mean())
        near, far = ((update(e) - update(-e)) / (2 * e) for e in (DISTANCE, 10 * DISTANCE))
    except Unmeasurable:
        raise
    except Exception as error:
        raise Unmeasurable(
            f"the step of {kind} cannot be tried on a copy ({type(error).__name__}: {error}): it has no derivative"
        ) from None
    if size == 0.0:
        return
    if changed < 0.3 and float((near.abs() > 1e-6 * size).double().mean()) < 0.05:
        raise Unmeasurable(
            f"a small change of the gradient does not change the update of {kind}: it takes signs, and has no "
            "derivative that means something"
        )
    if not float((near - far).norm()) <= 1e-2 * float(near.norm()):
        raise Unmeasurable(
            f"the update of {kind} is not proportional to small changes of the gradient: it is rounded, or jumps, and "
            "cannot be differentiated"
        )


def _refuse_hidden_state(own: OptimizerCopy) -> None:
    """The derivative is complete only if all that the step remembers is a float tensor in ``optimizer.state``."""
    optimizer = own.optimizer
    kept = {id(twin) for twin in own.moving}
    strange = [
        name
        for twin in own.moving
        for name, x in optimizer.state.get(twin, {}).items()
        if (isinstance(x, Tensor) and x.ndim and not x.is_floating_point())
        or (_tensors(x) and not isinstance(x, Tensor))
    ]
    strange += [
        name
        for name, x in vars(optimizer).items()
        if name not in ("state", "param_groups", "defaults")
        and (any(id(t) not in kept for t in _tensors(x)) or isinstance(x, torch.optim.Optimizer))
    ]
    if strange:
        raise Unmeasurable(
            f"{type(optimizer).__name__} remembers more than float tensors in its state ({strange[0]}): its update is "
            "not modelled"
        )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim]
