"""The derivative of a step whose formula is implemented, in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor

from lsp_callbacks.operators.trajectory.optimizer_input import (
    clipped_gradient,
    group_of,
    require_optimizer,
    tangent_of,
)
from lsp_callbacks.operators.trajectory.update_rules import Formula, Group, State, formula
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.snapshot import Snapshot, computed_once


@dataclass(frozen=True)
class _Part:
    """Parameters with the same options and the same history: one call of the formula moves them all.

    Attributes:
        ranges: where they lie in the flat vector.
        group: their options; None where nothing moves.
        t: number of this step for them.
        present: tensors of their state that exist already.
    """

    ranges: list[tuple[int, int]]
    group: Group | None
    t: float
    present: tuple[str, ...]

    def of(self, flat: Tensor) -> Tensor:
        slices = [flat[a:b] for a, b in self.ranges]
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    def write(self, flat: Tensor, values: Tensor) -> None:
        for (a, b), part in zip(self.ranges, values.split([b - a for a, b in self.ranges])):
            flat[a:b] = part


@computed_once
def formula_tangent(snapshot: Snapshot, *, initialised: bool = False) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Return ``(z, dg) -> z'``, dg the change of the clipped gradient, and the length of z.

    Args:
        snapshot: a step of an optimizer with a formula.
        initialised: differentiate as if all state tensors existed, and rates of 0 were the groups' ``initial_lr``.

    Raises:
        Unmeasurable: no optimizer, or one without a formula.
    """
    optimizer, gradient = require_optimizer(snapshot), clipped_gradient(snapshot)
    n = len(gradient)
    rule, blocks = formula(optimizer), state_blocks(snapshot)
    parameters = list(snapshot.parameters.values())
    theta = flatten(parameters, parameters).detach()
    states = {name: flatten([_state(optimizer, p).get(name) for p in parameters], parameters) for name in blocks}
    states = {name: state.detach().to(theta.dtype) for name, state in states.items()}
    parts = _parts(snapshot, blocks, initialised)

    def step(z: Tensor, change: Tensor) -> Tensor:
        v, *tangents = z.split(n)
        moved = dict(zip(blocks, tangents))
        new_v, new = v.clone(), {name: torch.zeros_like(v) for name in blocks}
        for part in parts:
            along = {name: part.of(moved[name]) for name in part.present}
            if part.group is None:
                for name, value in along.items():
                    part.write(new[name], value)
                continue
            before = {name: part.of(states[name]) for name in part.present}
            pushed = _push(
                rule, part, (part.of(theta), part.of(gradient), before), (part.of(v), part.of(change), along)
            )
            part.write(new_v, pushed[0])
            for name, value in pushed[1].items():
                part.write(new[name], value)
        return torch.cat([new_v, *new.values()])

    return step, (1 + len(blocks)) * n


def _push(rule: Formula, part: _Part, at: tuple, along: tuple) -> tuple[Tensor, State]:
    assert part.group is not None
    with torch.no_grad(), forward.dual_level():
        theta, g = (forward.make_dual(x, dx) for x, dx in zip(at[:2], along[:2]))
        state = {name: forward.make_dual(x, along[2][name]) for name, x in at[2].items()}
        new_theta, new_state = rule.step(theta, g, state, part.group, part.t)
        return tangent_of(new_theta), {name: tangent_of(x) for name, x in new_state.items()}


@computed_once
def formula_diagonals(snapshot: Snapshot) -> Tensor:
    """Return the derivative of an elementwise step, without clipping, as diagonals ``(2 + s, 1 + s, P)``: from, to.

    From the parameters, the s blocks of the state and, last, the clipped gradient, to the parameters and the blocks.

    Cost: no gradient where the step has one. Computed once a step.
    """
    step, size = formula_tangent(snapshot)
    like = clipped_gradient(snapshot)
    n = len(like)
    zeros, ones = like.new_zeros(n), like.new_ones(n)
    units = torch.eye(size // n, dtype=like.dtype, device=like.device).repeat_interleave(n, dim=1)
    rows = [*(step(z, zeros) for z in units), step(like.new_zeros(size), ones)]
    return torch.stack(rows).view(-1, size // n, n)


def state_blocks(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the names of the optimizer's state tensors that the step moves beside the parameters.

    SGD ``momentum_buffer``; Adam ``exp_avg, exp_avg_sq, max_exp_avg_sq``; RMSprop ``momentum_buffer, square_avg,
    grad_avg``; Adagrad ``sum``: those that the options of any parameter group need, the momentum first.

    Raises:
        Unmeasurable: no optimizer, or one without a formula.
    """
    return blocks_of(require_optimizer(snapshot))


def blocks_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the `state_blocks` of an optimizer."""
    rule = formula(optimizer)
    names = dict.fromkeys(block for group in optimizer.param_groups for block in rule.blocks(group))
    return tuple(sorted(names, key=lambda name: name not in ("momentum_buffer", "exp_avg")))


def _state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    # Not optimizer.state[p], which would create an entry.
    return optimizer.state.get(p, {})


def _parts(snapshot: Snapshot, blocks: tuple[str, ...], initialised: bool) -> list[_Part]:
    """Return the parameters by options and history; ``initialised``: see `formula_tangent`."""
    optimizer, groups = require_optimizer(snapshot), group_of(snapshot)
    rule, end = formula(optimizer), 0
    blocks_of_group = {id(group): rule.blocks(group) for group in optimizer.param_groups}
    parts: dict[tuple, _Part] = {}
    for name, p in snapshot.parameters.items():
        start, end = end, end + p.numel()
        group, state = groups[name], _state(optimizer, p)
        still = group is None or (snapshot.gradient is not None and snapshot.gradient[name] is None)
        wanted = blocks if still or group is None else blocks_of_group[id(group)]
        present = tuple(block for block in wanted if initialised or state.get(block) is not None)
        t = float(state.get("step", 0.0)) + 1
        key = (None if still else id(group), t, present)
        if initialised and group is not None:
            group = group | {"lr": float(group["lr"]) or float(group.get("initial_lr", 0.0))}
        part = parts.setdefault(key, _Part([], None if still else group, t, present))
        if part.ranges and part.ranges[-1][1] == start:
            part.ranges[-1] = (part.ranges[-1][0], end)
        else:
            part.ranges.append((start, end))
    return list(parts.values())
