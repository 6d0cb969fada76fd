"""Copies of an optimizer whose ``step`` can be tried without changing the original."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import copied_optimizer, forget_step_hooks
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.errors import Unmeasurable

#: Index of the parameter, name and shape of each float tensor of a state.
Layout = list[tuple[int, str, tuple[int, ...]]]


class OptimizerCopy:
    """A copy of an optimizer with the parameters that it holds, in float64; the original is never touched."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor] | None = None):
        self.optimizer = _copied(optimizer)
        forget_step_hooks(self.optimizer)
        twins = {id(p): twin for p, twin in zip(held(optimizer), held(self.optimizer))}
        for twin in twins.values():
            twin.data, twin.grad = twin.data.double(), None
            state = self.optimizer.state.get(twin, {})
            state.update({name: state[name].double() for name in float_names(state)})
        self.moving = list(twins.values())
        # Parameters that the optimizer does not hold stay where they are.
        self.twins = [twins.get(id(p), p.detach().double()) for p in (parameters or held(optimizer))]

    def layout(self) -> Layout:
        """Return the layout of the optimizer's state."""
        states = [self.optimizer.state.get(twin, {}) for twin in self.twins]
        return [(k, name, tuple(state[name].shape)) for k, state in enumerate(states) for name in float_names(state)]

    def read(self, layout: Layout) -> Tensor:
        """Return ``(theta, s)``, flat; zeros for state tensors that do not exist yet."""
        values = [twin.detach().reshape(-1) for twin in self.twins]
        for k, name, shape in layout:
            tensor = self.optimizer.state.get(self.twins[k], {}).get(name)
            if tensor is not None and tuple(tensor.shape) != shape:
                kind = type(self.optimizer).__name__
                raise Unmeasurable(f"{kind} changes the shape of its state in a step, which has no derivative then")
            values.append(values[0].new_zeros(shape).reshape(-1) if tensor is None else tensor.detach().reshape(-1))
        return torch.cat(values)

    def displace(self, layout: Layout, z: Tensor) -> None:
        """Move parameters and state by ``z``; state tensors that do not exist yet are not created."""
        parts = iter(z.split([t.numel() for t in self.twins] + [torch.Size(shape).numel() for _, _, shape in layout]))
        self.twins = [_added(twin, next(parts)) for twin in self.twins]
        for k, name, _ in layout:
            state, part = self.optimizer.state.get(self.twins[k], {}), next(parts)
            if name in state:
                state[name] = state[name] + part.view_as(state[name])

    def step(self, gradients: Sequence[Tensor | None], random_state: RandomState) -> None:
        """Run one real step of the copy; the global random state is left as it was."""
        moving = {id(twin) for twin in self.moving}
        for twin, g in zip(self.twins, gradients):
            if id(twin) in moving:
                twin.grad = None if g is None else g.detach().clone()
        # The step of the class, without hooks: a scheduler may have put one on the instance, bound to the original.
        step: Any = type(self.optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        random_state.restore()
        try:
            step(self.optimizer)
        finally:
            random_state.restore()


def _added(twin: Tensor, change: Tensor) -> Tensor:
    twin.data = twin.data + change.view_as(twin)
    return twin


def _copied(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    try:
        if hasattr(optimizer, "__deepcopy__"):
            return copy.deepcopy(optimizer)
        return copied_optimizer(optimizer, {})  # pickling, and so deepcopy, would drop what a wrapper holds
    except Exception as error:
        raise Unmeasurable(
            f"{type(optimizer).__name__} cannot be copied ({type(error).__name__}: {error}), so its step cannot be "
            "differentiated: make it work with copy.deepcopy, or leave this quantity out"
        ) from None


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def float_names(state: dict[str, Any]) -> list[str]:
    """Return the names of the float tensors in a parameter's state; counters and numbers have no derivative."""
    return sorted(name for name, x in state.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim)
