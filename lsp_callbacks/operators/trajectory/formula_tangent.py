"""The derivative of a step whose formula is implemented, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.spread_tensors import local
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_gradient
from lsp_callbacks.operators.trajectory.update_rules import Coupled, Group, Linear, formula
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: Names of what is no tensor of the optimizer's state: the parameters, and the gradient that the optimizer receives.
THETA, GRADIENT = "theta", "g"


@dataclass(frozen=True)
class Part:
    """Parameters with the same options and the same history, whose derivatives have one formula.

    Attributes:
        ranges: where they lie in the flat vector.
        derivatives: of parameters and state after the step, by those before it and by the gradient.
    """

    ranges: list[tuple[int, int]]
    derivatives: dict[str, Linear]

    def of(self, flat: Tensor) -> Tensor:
        """Return the part's numbers of a flat vector; a view where they lie side by side."""
        slices = [flat[a:b] for a, b in self.ranges]
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    def add(
        self, target: Tensor, derivative: float | Tensor | Coupled, source: Tensor, *, transposed: bool = False
    ) -> None:
        """Add the derivative, or its transpose, times the part's numbers of one flat vector to those of another."""
        if isinstance(derivative, Coupled):
            ((a, b),) = self.ranges
            target[a:b].add_(derivative.pull(source[a:b]) if transposed else derivative.push(source[a:b]))
            return
        start = 0
        for a, b in self.ranges:
            if isinstance(derivative, Tensor):
                target[a:b].addcmul_(derivative[start : start + b - a], source[a:b])
                start += b - a
            else:
                target[a:b].add_(source[a:b], alpha=derivative)


@dataclass(frozen=True)
class FormulaTangent:
    """The derivative of an optimizer's step, without clipping, as diagonals by blocks, or one map for each parameter.

    Attributes:
        blocks: of the state behind the parameters.
        length: of each block.
        parts: which parameters share a formula.
    """

    blocks: tuple[str, ...]
    length: int
    parts: list[Part]

    @property
    def size(self) -> int:
        """Return the length of the whole state ``z``."""
        return (1 + len(self.blocks)) * self.length

    def image(self, block: str, along: Mapping[str, Tensor]) -> Tensor:
        """Return the change of one block of the state after the step, for changes of blocks before it."""
        return self.add_image(block, along, torch.zeros_like(next(iter(along.values()))))

    def add_image(self, block: str, along: Mapping[str, Tensor], image: Tensor) -> Tensor:
        """Add what `image` returns to a vector, and return that."""
        for part in self.parts:
            for name, derivative in part.derivatives.get(block, {}).items():
                if name in along:
                    part.add(image, derivative, along[name])
        return image

    def reach(self, block: str, source: str, like: Tensor) -> Tensor:
        """Return by how much a unit of each number of a block, or of the gradient, moves those of another block."""
        reach = torch.zeros_like(like)
        for part in self.parts:
            derivative = part.derivatives.get(block, {}).get(source, 0.0)
            if isinstance(derivative, Coupled):
                derivative = derivative.factor * derivative.size
            part.add(reach, derivative, torch.ones_like(like))
        return reach.abs_()

    def push(self, z: Tensor, change: Tensor) -> Tensor:
        """Return ``z'`` for a change z of the state and ``change`` of the clipped gradient."""
        names = (THETA, *self.blocks)
        along = {**dict(zip(names, z.split(self.length))), GRADIENT: change.to(z)}
        return torch.cat([self.image(name, along) for name in names])

    def pull(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the transpose of `push`."""
        names = (THETA, *self.blocks)
        back = {name: torch.zeros_like(w[: self.length]) for name in (*names, GRADIENT)}
        for block, row in zip(names, w.split(self.length)):
            for part in self.parts:
                for name, derivative in part.derivatives.get(block, {}).items():
                    part.add(back[name], derivative, row, transposed=True)
        change = back.pop(GRADIENT)
        return torch.cat([back[name] for name in names]), change


@computed_once
def formula_tangent(snapshot: Snapshot, *, initialised: bool = False) -> FormulaTangent:
    """Return the derivative of the step by parameters, state and clipped gradient.

    Args:
        snapshot: a step of an optimizer with a formula.
        initialised: differentiate as if all state tensors existed, and rates of 0 were the groups' ``initial_lr``.

    Raises:
        Unmeasurable: no optimizer, or one without a formula.

    Cost: no gradient where the step has one; for SGD nothing is read.
    """
    optimizer, groups = snapshot.require_optimizer(), snapshot.groups
    rule, blocks, end = formula(optimizer), state_blocks(snapshot), 0
    blocks_of_group = {id(group): rule.blocks(group) for group in optimizer.param_groups}
    ranges: dict[tuple, list[tuple[int, int]]] = {}
    options: dict[tuple, Group | None] = {}
    originals = snapshot.unsplit.parameters
    for name, p in snapshot.parameters.items():
        start, end = end, end + p.numel()
        group, state = groups[name], _state(optimizer, originals[name])
        still = group is None or (snapshot.gradient is not None and snapshot.gradient[name] is None)
        wanted = blocks if still or group is None else blocks_of_group[id(group)]
        present = tuple(block for block in wanted if initialised or state.get(block) is not None)
        t = float(state.get("step", 0.0)) + 1
        numbers = tuple(float(state.get(name, math.nan)) for name in rule.numbers)
        # A NaN is not equal to itself, and would make a part of each parameter.
        key = (None if still else id(group), t, present, str(numbers), name if rule.couples and not still else "")
        if initialised and group is not None:
            group = group | {"lr": float(group["lr"]) or float(group.get("initial_lr", 0.0))}
        options.setdefault(key, None if still or group is None else rule.options(group, state))
        ranges_of_part = ranges.setdefault(key, [])
        if ranges_of_part and ranges_of_part[-1][1] == start:
            start = ranges_of_part.pop()[0]
        ranges_of_part.append((start, end))
    parts = []
    for key, group in options.items():
        _, t, present, _, name = key
        part = Part(ranges[key], {name: {name: 1.0} for name in (THETA, *present)})
        if group is not None:
            shape = snapshot.parameters[name].shape if rule.couples else None
            at = _Before(snapshot, part, present, shape)
            derivatives = rule.derivatives(at, group, t)
            part = Part(part.ranges, {block: _existing(form, present) for block, form in derivatives.items()})
        parts.append(part)
    return FormulaTangent(blocks, end, parts)


def has_state(snapshot: Snapshot) -> bool:
    """Return whether all state tensors exist that the step reads: without them it is another map than those after it.

    Raises:
        Unmeasurable: no optimizer, or one without a formula.
    """
    optimizer, groups = snapshot.require_optimizer(), snapshot.groups
    rule, gradient = formula(optimizer), snapshot.gradient
    return all(
        _state(optimizer, p).get(block) is not None
        for name, p in snapshot.unsplit.parameters.items()
        if (group := groups[name]) is not None and (gradient is None or gradient[name] is not None)
        for block in rule.blocks(group)
    )


def _existing(form: Linear, present: tuple[str, ...]) -> Linear:
    """Return a derivative without that by tensors which do not exist before the step."""
    return {name: value for name, value in form.items() if name in (THETA, GRADIENT, *present)}


class _Before(Mapping[str, Tensor]):
    """Parameters, clipped gradient and state before a step, of one part; flat when they are read, or in a shape."""

    def __init__(self, snapshot: Snapshot, part: Part, present: tuple[str, ...], shape: torch.Size | None = None):
        self.snapshot, self.part, self.names, self.shape = snapshot, part, (THETA, GRADIENT, *present), shape

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        parameters = list(self.snapshot.parameters.values())
        if name == GRADIENT:
            values = clipped_gradient(self.snapshot)
        elif name == THETA:
            values = flatten(parameters, parameters)
        else:
            optimizer, originals = self.snapshot.require_optimizer(), self.snapshot.unsplit.parameters.values()
            state = [_state(optimizer, p).get(name) for p in originals]
            values = flatten([None if t is None else local(t) for t in state], parameters)
        flat = self.part.of(values.detach()).to(torch.promote_types(parameters[0].dtype, torch.float32))
        return flat if self.shape is None else flat.view(self.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def state_blocks(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the names of the optimizer's state tensors that the step moves beside the parameters.

    SGD and Muon ``momentum_buffer``; Adam ``exp_avg, exp_avg_sq, max_exp_avg_sq``, and alike NAdam and RAdam; Adamax
    ``exp_avg, exp_inf``; RMSprop ``momentum_buffer, square_avg, grad_avg``; Adagrad ``sum``: those that the options of
    any parameter group need, the momentum first.

    Raises:
        Unmeasurable: no optimizer, or one without a formula.
    """
    return blocks_of(snapshot.require_optimizer())


def blocks_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the `state_blocks` of an optimizer."""
    rule = formula(optimizer)
    names = dict.fromkeys(block for group in optimizer.param_groups for block in rule.blocks(group))
    return tuple(sorted(names, key=lambda name: name not in ("momentum_buffer", "exp_avg")))


def _state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    # Not optimizer.state[p], which would create an entry.
    return optimizer.state.get(p, {})
