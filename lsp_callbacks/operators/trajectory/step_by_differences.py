"""The derivative of a step without an implemented formula: differences of the optimizer's ``step`` on copies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import tree_leaves
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.trajectory.optimizer_copy import OptimizerCopy, float_names, held
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.snapshot import Snapshot

#: Relative distance of the differences, in float64: their error is about 1e-9 where the step is smooth.
DISTANCE = 1e-5
#: Relative deviation, in norm, that is accepted between differences to both sides: about 1e-5 for a smooth step.
AGREEMENT = 1e-3
#: Attributes that every optimizer has.
OF_ANY_OPTIMIZER = frozenset(vars(torch.optim.SGD([torch.zeros(())]))) | {"step"}

#: Parameters with their gradients.
Gradients = Iterable[tuple[Tensor, Tensor | None]]

#: ``(z, dg) -> z'``.
Tangent = Callable[[Tensor, Tensor], Tensor]


def require_single_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Raise `Unmeasurable` if a step of the optimizer takes more than one gradient (SAM, LBFGS)."""
    kind = type(optimizer).__name__
    closure = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
    require_gradient_at_weights(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise Unmeasurable(f"{kind} evaluates the loss several times in a step (closure): its update is not supported")


def require_gradient_at_weights(optimizer: torch.optim.Optimizer) -> None:
    """Raise `Unmeasurable` if a step is seen when its weights were displaced already (``first_step`` of a SAM)."""
    if hasattr(optimizer, "first_step"):
        raise Unmeasurable(
            f"{type(optimizer).__name__} makes its step out of two gradients: its update is not supported"
        )


def difference_tangent(snapshot: Snapshot, gradient: Tensor) -> tuple[Tangent, int]:
    """Return the derivative of the step of an optimizer without a formula, by differences of its ``step``.

    With ``f(e) = step(z_0 + e z, g + e dg)`` on deep copies of the optimizer in float64 it is
    ``((f(e) - f(0)) / e + 2 (f(0) - f(-e/2)) / (e/2)) / 3``, exact up to third order. The state is ``z = (v, s)``: a
    displacement of the parameters, then each float tensor of the optimizer's state by parameter and name, in its own
    shape. Counters and numbers (shape ``()``) are not part of it. Random numbers that the step draws are the same in
    all copies.

    e is small relative to parameters and gradient, and where that is not enough, relative to each tensor of the state;
    tensors of zeros have no size to compare with. Whether e was small enough follows from the two slopes: they agree in
    each block where the step is smooth, and differ by a factor where a root or a norm near 0 is crossed; then smaller
    values are tried, down to 1e-11.

    Args:
        snapshot: a step, with its optimizer before the update.
        gradient: the gradient that the optimizer receives, flat.

    Returns:
        ``(z, dg) -> z'``, and the length of z.

    Raises:
        Unmeasurable: if the optimizer cannot be copied, needs a closure, its state changes shape, or its step jumps.

    Cost: two optimizer steps in double precision, on copies of parameters and state, and one for all products.
    """
    optimizer = snapshot.optimizer
    assert optimizer is not None
    parameters = list(snapshot.parameters.values())
    moved = [snapshot.gradient is None or snapshot.gradient[name] is not None for name in snapshot.parameters]
    g, n = gradient.double(), gradient.numel()
    random_state = RandomState()

    def stepped(displaced: Callable[[OptimizerCopy], None], gradient: Tensor) -> OptimizerCopy:
        trial = OptimizerCopy(optimizer, parameters)
        displaced(trial)
        trial.step([part if moves else None for moves, part in zip(moved, split(gradient, parameters))], random_state)
        return trial

    after = stepped(lambda trial: None, g)
    layout = after.layout()
    start, plain = OptimizerCopy(optimizer, parameters).read(layout), after.read(layout)
    blocks = [n, *(torch.Size(shape).numel() for _, _, shape in layout)]

    def tangent(z: Tensor, change: Tensor) -> Tensor:
        z, dg = z.double(), change.double()
        for e in _distances(zip((*start.split(blocks), g), (*z.split(blocks), dg)), plain[:n] - start[:n]):
            ahead, behind = (
                (stepped(lambda trial, h=h: trial.displace(layout, h * z), g + h * dg).read(layout) - plain) / h  # type: ignore[misc]
                for h in (e, -e / 2)
            )
            if _agree(ahead.split(blocks), behind.split(blocks), plain.split(blocks), e):
                return ((ahead + 2 * behind) / 3).to(gradient.dtype)
        raise Unmeasurable(
            f"the step of {type(optimizer).__name__} is not smooth here (a root or a norm at 0, a jump): its "
            "derivative is not meaningful at this step"
        )

    return tangent, len(start)


def _distances(pairs: Iterable[tuple[Tensor, Tensor]], update: Tensor) -> list[float]:
    """Return the distances to try: small relative to parameters and gradient, then to all tensors, then smaller."""
    sizes = [(float(norm(x)), float(norm(dx))) for x, dx in pairs]
    ratios = [x / dx if dx and x else None for x, dx in sizes]
    main = [r for r in (ratios[0], ratios[-1]) if r is not None]
    if not main:  # all displaced tensors are 0: as far as the step itself moves them
        largest = max(dx for _, dx in sizes)
        main = [(float(norm(update)) or 1.0) / largest] if largest else [1.0]
    near, nearest = min(main), min(r for r in [*ratios, *main] if r is not None)
    return [DISTANCE * near, *(DISTANCE * nearest * 10.0**-k for k in (0, 2, 4, 6))]


def _agree(ahead: Sequence[Tensor], behind: Sequence[Tensor], plain: Sequence[Tensor], e: float) -> bool:
    for a, b, x in zip(ahead, behind, plain):
        size, rounding = float(norm(a)), 16 * torch.finfo(x.dtype).eps * float(norm(x)) / e
        if not float(norm(a - b)) <= AGREEMENT * size + rounding:
            return False
    return True


def require_smooth(
    optimizer: torch.optim.Optimizer, generator: torch.Generator, gradient: Gradients | None = None
) -> None:
    """Raise an error if the derivative of an optimizer's step is not meaningful; tried on copies, by random gradients.

    Args:
        optimizer: before its step.
        generator: of the gradients.
        gradient: by parameter; the random gradients get its sizes, to which the optimizer's state is used. None is 1.

    Raises:
        Unmeasurable: two-step optimizers (SAM), those that need a closure (LBFGS), state that is not made of float
            tensors, sign-based updates (a small relative change of the gradient does not change them), and updates that
            are rounded (the response to a small change is not proportional to it).

    Cost: nine steps on copies, no gradient.
    """
    require_single_gradient(optimizer)
    kind = type(optimizer).__name__
    try:
        trial, random_state = OptimizerCopy(optimizer), RandomState()
    except Exception as error:  # out of memory, or an error of the user's optimizer
        raise Unmeasurable(
            f"{kind} cannot be copied ({type(error).__name__}: {error}), so its step cannot be differentiated"
        ) from None
    for group in trial.optimizer.param_groups:
        group["lr"] = group.get("lr") or 1e-3  # at rate 0 no change would show
    # The second step: in its first one even Adam's update is a sign.
    sizes = _sizes(optimizer, gradient)
    first = [
        size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        for p, size in zip(trial.twins, sizes)
    ]
    uniform = [torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in trial.twins]
    sign = [torch.randint(0, 2, p.shape, generator=generator).to(p.device) * 2.0 - 1 for p in trial.twins]
    try:
        trial.step(first, random_state)
        _require_visible_state(trial)
        before = trial.read([])

        def update(distance: float) -> Tensor:
            twin = OptimizerCopy(trial.optimizer)
            twin.step([g * s * (0.5 + u) * (1 + distance * s) for g, u, s in zip(first, uniform, sign)], random_state)
            return twin.read([]) - before

        plain = update(0.0)
        size, changed = float(plain.square().mean().sqrt()), float(((update(0.1) - plain) != 0).double().mean())
        near, far, wide = ((update(e) - update(-e)) / (2 * e) for e in (DISTANCE, 10 * DISTANCE, 0.1))
    except Unmeasurable:
        raise
    except Exception as error:
        raise Unmeasurable(
            f"the step of {kind} cannot be tried on a copy ({type(error).__name__}: {error}), so it cannot be "
            "differentiated"
        ) from None
    rounding = 4 * torch.finfo(before.dtype).eps * float(norm(before))
    if size * len(before) ** 0.5 <= 1e3 * rounding:  # it hardly moves the parameters: no change would show
        return
    if changed < 0.3 and float((near.abs() > 1e-6 * size).double().mean()) < 0.05:
        raise Unmeasurable(
            f"a small change of the gradient does not change the update of {kind}, as if it used signs: its derivative "
            "is not meaningful"
        )
    # A rounded update does not change with small changes of the gradient, but with large ones.
    jumps = float(near.norm()) < 0.1 * float(wide.norm()) - rounding / DISTANCE
    if jumps or not float((near - far).norm()) <= 1e-2 * float(near.norm()) + rounding / DISTANCE:
        raise Unmeasurable(
            f"the update of {kind} is not proportional to small changes of the gradient: it is rounded, or jumps, and "
            "cannot be differentiated"
        )


def _sizes(optimizer: torch.optim.Optimizer, gradient: Gradients | None) -> list[float]:
    """Return root mean squares of the gradients; the largest where one is 0, and 1 where all are."""
    sizes = {id(p): float(norm(g)) / g.numel() ** 0.5 for p, g in gradient or () if g is not None and g.numel()}
    largest = max((x for x in sizes.values() if math.isfinite(x)), default=0.0) or 1.0
    return [sizes.get(id(p)) or largest for p in held(optimizer)]


def _require_visible_state(trial: OptimizerCopy) -> None:
    """Raise an error if a step remembers anything but float tensors in ``optimizer.state``: they have a derivative."""
    optimizer = trial.optimizer
    kept = {id(twin) for twin in trial.moving}
    hidden = [
        name
        for twin in trial.moving
        for name, x in optimizer.state.get(twin, {}).items()
        if (isinstance(x, Tensor) and x.ndim and not x.is_floating_point())
        or (_tensors(x) and not isinstance(x, Tensor))
    ]
    hidden += [
        name
        for name, x in vars(optimizer).items()
        if name not in OF_ANY_OPTIMIZER and not all(_is_harmless(leaf, optimizer, kept) for leaf in tree_leaves(x))
    ]
    if hidden:
        raise Unmeasurable(
            f"{type(optimizer).__name__} remembers more than float tensors in its state ({hidden[0]}): its update is "
            "not supported"
        )
    for state in (optimizer.state.get(twin, {}) for twin in trial.moving):
        for name in float_names(state):
            if torch.finfo(state[name].dtype).bits < 32:
                kind = str(state[name].dtype).removeprefix("torch.")
                raise Unmeasurable(
                    f"{type(optimizer).__name__} rounds its state to {kind} ({name}): small changes of it are lost, "
                    "and its derivative is not meaningful"
                )


def _is_harmless(value: Any, optimizer: torch.optim.Optimizer, parameters: Container[int]) -> bool:
    """Return whether an attribute holds no tensor beside the parameters and the optimizer's visible state."""
    if isinstance(value, torch.optim.Optimizer):  # of a wrapper
        inner = {k: v for k, v in vars(value).items() if k not in OF_ANY_OPTIMIZER}
        leaves = tree_leaves(inner)
        return value.state is optimizer.state and all(_is_harmless(leaf, optimizer, parameters) for leaf in leaves)
    if isinstance(value, Tensor):
        return id(value) in parameters or not value.ndim
    return value is None or isinstance(value, int | float | complex | str | bytes | type | torch.dtype | torch.device)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim]
