"""The Jacobian of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.hessian import Method, hessian
from lsp_callbacks.operators.trajectory.step_by_differences import own_step_tangent, require_smooth
from lsp_callbacks.operators.trajectory.update_rules import Formula, Group, State, formula, formula_of
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.players import require_one
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot, computed_once

Path = Literal["exact", "finite_difference_of_step"]


def known_optimizer(snapshot: Snapshot) -> torch.optim.Optimizer:
    """The step's optimizer.

    Raises:
        Unmeasurable: if there is none, or the step is not that of the optimizer on the step's loss.
    """
    if snapshot.optimizer is None:
        raise Unmeasurable("no optimizer is known: pass optimizer=... to the Snapshot")
    if why := snapshot.unsupported or snapshot.run.invalidated:
        raise Unmeasurable(why)
    return snapshot.optimizer


def group_of(snapshot: Snapshot) -> dict[str, Group | None]:
    """The options that each trainable parameter has in this very step; None for what the optimizer does not hold."""
    optimizer = known_optimizer(snapshot)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: groups.get(id(p)) for name, p in snapshot.parameters.items()}


def tangent_path(snapshot: Snapshot) -> Path:
    """Return how `step_jacobian` finds the derivative of the step; replays nothing.

    Raises:
        Unmeasurable: if it cannot.
    """
    optimizer = known_optimizer(snapshot)
    if formula_of(optimizer) is not None:
        formula(optimizer)
        return "exact"
    gradient = snapshot.gradient or {}
    require_smooth(
        optimizer, snapshot.generator("own step"), [(p, gradient.get(name)) for name, p in snapshot.parameters.items()]
    )
    return "finite_difference_of_step"


@computed_once
def clipped_gradient(snapshot: Snapshot) -> Tensor:
    """What the optimizer sees, flat: the step's gradient after its clipping, 0 where a parameter has none."""
    return _clip(snapshot)(_own_gradient(snapshot))


@computed_once
def _own_gradient(snapshot: Snapshot) -> Tensor:
    return snapshot.flat_gradient if snapshot.flat_gradient is not None else replayed_gradient(snapshot)[1]


def _clip(snapshot: Snapshot) -> Callable[[Tensor], Tensor]:
    clipping = snapshot.clipping
    if clipping is None:
        return lambda g: g
    held = held_mask(snapshot)
    return lambda g: clipping(g if held is None else held * g)


def held_mask(snapshot: Snapshot) -> Tensor | None:
    """1 where the optimizer holds a parameter, 0 elsewhere, flat; None if it holds all."""
    groups = group_of(snapshot).values()
    if all(group is not None for group in groups):
        return None
    parameters = list(snapshot.parameters.values())
    return flatten([None if g is None else torch.ones_like(p) for g, p in zip(groups, parameters)], parameters)


@dataclass(frozen=True)
class _Part:
    """Parameters with the same options and the same history: one call of the formula moves them all.

    Attributes:
        ranges: where they lie in the flat vector.
        group: their options; None where nothing moves.
        t: number of this step for them.
        present: tensors of their state that are there already.
    """

    ranges: list[tuple[int, int]]
    group: Group | None
    t: float
    present: tuple[str, ...]

    def of(self, flat: Tensor) -> Tensor:
        pieces = [flat[a:b] for a, b in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def write(self, flat: Tensor, values: Tensor) -> None:
        for (a, b), piece in zip(self.ranges, values.split([b - a for a, b in self.ranges])):
            flat[a:b] = piece


def step_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``A_t``, the derivative of one step of the real optimizer with respect to its parameters and its state.

    The state is ``z = (v, s_1, ...)``: a displacement v of the parameters, then one block for each float tensor of the
    optimizer's state, see `state_blocks`, P numbers each. An optimizer without couplings is an elementwise map
    ``(theta, g, s) -> (theta', s')``, here differentiated in forward mode along ``(v, dg, ds)``, with ``dg = H v``
    after the derivative of the clipping, ``kappa (I - g g^T / ||g||^2) H v`` where it is by norm and active. Nothing is
    frozen. Parameters without a gradient, and those that the optimizer does not hold, stay as they are; a state
    tensor that is not there before the step has no derivative. Where nu is 0 see `operators.formulas.root`. What is
    done to the parameters after the step (`RunContext.prox`) is not part of it: see
    `operators.proximal.update_jacobian`.

    Any other optimizer: see `operators.own_step.own_step_tangent`; its blocks have sizes of their own.

    Args:
        snapshot: a step of one optimizer, before the update; for several see `operators.game.joint_jacobian`.
        method: of the Hessian products.

    Returns:
        A square operator, with its adjoint where the optimizer has a formula, see `step_adjoint`.

    Raises:
        Unmeasurable: no optimizer, a step that is not modelled, or one without a derivative.

    Cost: one Hessian product; none for ``v = 0``. A copy of parameters, gradient and state. Source: torch.optim.
    """
    require_one(snapshot.player)
    optimizer = known_optimizer(snapshot)  # before anything is replayed
    H = used_hessian(snapshot, method)
    n = H.shape[0]
    tangent, size = step_tangent(snapshot)

    def adjoint(w: Tensor) -> Tensor:
        z, change = step_adjoint(snapshot, w)
        return torch.cat([z[:n] + H.apply(change), z[n:]])

    known = adjoint if formula_of(optimizer) is not None else None
    return LinearOperator((size, size), lambda z: tangent(z, H.apply(z[:n])), known, dtype=H.dtype, device=H.device)


def used_hessian(snapshot: Snapshot, method: Method) -> LinearOperator:
    """The Hessian as accurate as the step's Jacobian needs it: what Adam divides by its second moments is divided too.

    Where the formula is not known neither is what the step makes of rounding: ``"auto"`` is exact there.
    """
    rule = formula_of(known_optimizer(snapshot))
    if rule is None or method == "exact":
        return hessian(snapshot, method="exact" if method == "auto" else method)
    weight: Tensor | float
    if rule.second_moment is None:
        weight = max((float(group["lr"]) for group in group_of(snapshot).values() if group), default=0.0)
    else:
        weight = _response(snapshot)
    return hessian(snapshot, method=method, weight=weight, relative=False)


@computed_once
def _response(snapshot: Snapshot) -> Tensor:
    """``|d theta' / d g|``, of each parameter, without clipping."""
    step, size = _formula_tangent(snapshot)
    like = clipped_gradient(snapshot)
    return step(like.new_zeros(size), torch.ones_like(like))[: len(like)].abs()


def step_response(snapshot: Snapshot) -> LinearOperator:
    """The derivative of one step of the real optimizer with respect to the gradient that its loss has.

    If the gradient were ``g + dg``, the state after the step would differ by ``R dg``, to first order: clipping and
    formula are differentiated as in `step_jacobian`, at unchanged parameters and state. For plain SGD ``R = -lr``. A
    perturbation of the data that changes the gradients by ``dg_t`` moves the run by ``r' = A_t r + R_t dg_t``.

    Args:
        snapshot: a step, with its optimizer before the update.

    Returns:
        From ``(P,)`` to the state of `step_jacobian`.

    Raises:
        Unmeasurable: as `step_jacobian`.

    Cost: no gradient where the step has its own, otherwise one.
    """
    own = clipped_gradient(snapshot)
    tangent, size = step_tangent(snapshot)
    dtype = torch.promote_types(own.dtype, torch.float32)

    def response(change: Tensor) -> Tensor:
        return tangent(change.new_zeros(size), change)

    known = None if formula_of(known_optimizer(snapshot)) is None else lambda w: step_adjoint(snapshot, w)[1]
    return LinearOperator((size, len(own)), response, known, dtype=dtype, device=own.device)


def step_tangent(snapshot: Snapshot) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """``(z, dg) -> z'``: the derivative of the optimizer's step alone, and the length of z.

    z is the state of `step_jacobian`; dg the change of the step's gradient, before clipping, whatever has caused it.

    Raises:
        Unmeasurable: as `step_jacobian`.

    Cost: no gradient where the step has its own.
    """
    if formula_of(known_optimizer(snapshot)) is None:
        step, size = own_step_tangent(snapshot, clipped_gradient(snapshot))
    else:
        step, size = _formula_tangent(snapshot)
    return lambda z, change: step(z, _gradient_change(snapshot, change)), size


@computed_once
def step_diagonals(snapshot: Snapshot) -> Tensor:
    """The derivative of an elementwise step, ``(2 + s, 1 + s, P)``, without clipping: from and to.

    From the parameters, the s blocks of the state and, last, the clipped gradient, to the parameters and the blocks.

    Cost: no gradient where the step has its own. Computed once a step.
    """
    step, size = _formula_tangent(snapshot)
    n = len(clipped_gradient(snapshot))
    like = clipped_gradient(snapshot)
    none, one = like.new_zeros(n), like.new_ones(n)
    units = torch.eye(size // n, dtype=like.dtype, device=like.device).repeat_interleave(n, dim=1)
    return torch.stack([*(step(z, none) for z in units), step(like.new_zeros(size), one)]).view(-1, size // n, n)


def step_adjoint(snapshot: Snapshot, w: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of `step_tangent` for an optimizer with a formula: ``(z, dg)``, dg back through the clipping.

    Cost: as `step_diagonals`.
    """
    diagonals = step_diagonals(snapshot)
    back = (diagonals * w.view(1, *diagonals.shape[1:])).sum(1)
    return back[:-1].flatten(), _gradient_change(snapshot, back[-1])


def _formula_tangent(snapshot: Snapshot, *, begun: bool = False) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """As `step_tangent`, from the change of the clipped gradient; ``begun``: see `_parts`."""
    optimizer, own = known_optimizer(snapshot), clipped_gradient(snapshot)
    n = len(own)
    rule, blocks = formula(optimizer), blocks_of(optimizer)
    parameters = list(snapshot.parameters.values())
    theta = flatten(parameters, parameters).detach()
    states = {name: flatten([_state(optimizer, p).get(name) for p in parameters], parameters) for name in blocks}
    states = {name: state.detach().to(theta.dtype) for name, state in states.items()}
    parts = _parts(snapshot, optimizer, rule, blocks, begun=begun)

    def step(z: Tensor, change: Tensor) -> Tensor:
        v, *tangents = z.split(n)
        moved = dict(zip(blocks, tangents))
        new_v, new = v.clone(), {name: torch.zeros_like(v) for name in blocks}
        for part in parts:
            known = {name: part.of(moved[name]) for name in part.present}
            if part.group is None:
                for name, value in known.items():
                    part.write(new[name], value)
                continue
            before = {name: part.of(states[name]) for name in part.present}
            pushed = _push(rule, part, (part.of(theta), part.of(own), before), (part.of(v), part.of(change), known))
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
        return _tangent(new_theta), {name: _tangent(x) for name, x in new_state.items()}


def _tangent(x: Tensor) -> Tensor:
    primal, tangent = forward.unpack_dual(x)
    return torch.zeros_like(primal) if tangent is None else tangent


def _gradient_change(snapshot: Snapshot, change: Tensor) -> Tensor:
    """What a change of the gradient becomes by the clipping."""
    if snapshot.clipping is None:
        return change
    with torch.no_grad(), forward.dual_level():
        return _tangent(_clip(snapshot)(forward.make_dual(_own_gradient(snapshot), change)))


def _state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    # Not optimizer.state[p], which would create an entry.
    return optimizer.state.get(p, {})


def _parts(
    snapshot: Snapshot, optimizer: torch.optim.Optimizer, rule: Formula, blocks: tuple[str, ...], *, begun: bool
) -> list[_Part]:
    """The parameters by options and history; ``begun``: as if each state were there already, and no rate were 0."""
    groups, end = group_of(snapshot), 0
    blocks_of_group = {id(group): rule.blocks(group) for group in optimizer.param_groups}
    found: dict[tuple, _Part] = {}
    for name, p in snapshot.parameters.items():
        start, end = end, end + p.numel()
        group, state = groups[name], _state(optimizer, p)
        still = group is None or (snapshot.gradient is not None and snapshot.gradient[name] is None)
        wanted = blocks if still or group is None else blocks_of_group[id(group)]
        present = tuple(block for block in wanted if begun or state.get(block) is not None)
        t = float(state.get("step", 0.0)) + 1
        key = (None if still else id(group), t, present)
        if begun and group is not None:
            group = group | {"lr": float(group["lr"]) or float(group.get("initial_lr", 0.0))}
        part = found.setdefault(key, _Part([], None if still else group, t, present))
        if part.ranges and part.ranges[-1][1] == start:
            part.ranges[-1] = (part.ranges[-1][0], end)
        else:
            part.ranges.append((start, end))
    return list(found.values())


def state_blocks(snapshot: Snapshot) -> tuple[str, ...]:
    """The float tensors of the optimizer's state that the step moves beside the parameters.

    SGD ``momentum_buffer``; Adam ``exp_avg, exp_avg_sq, max_exp_avg_sq``; RMSprop ``momentum_buffer, square_avg,
    grad_avg``; Adagrad ``sum``: those that the options of any parameter group ask for, the momentum first.

    Raises:
        Unmeasurable: no optimizer, or one without a formula.
    """
    return blocks_of(known_optimizer(snapshot))


def blocks_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """See `state_blocks`."""
    rule = formula(optimizer)
    names = dict.fromkeys(block for group in optimizer.param_groups for block in rule.blocks(group))
    return tuple(sorted(names, key=lambda name: name not in ("momentum_buffer", "exp_avg")))


def parameter_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """``d theta' / d theta`` of one step, the optimizer's state held as it is before it.

    The parameters' own block of `step_jacobian`; of SGD without momentum and clipping it is ``I - lr H'``.

    Raises:
        Unmeasurable: see `step_jacobian`; an optimizer without a formula.

    Cost: one Hessian product a product.
    """
    formula(known_optimizer(snapshot))
    A = step_jacobian(snapshot, method=method)
    n = sum(p.numel() for p in snapshot.parameters.values())

    def block(of: LinearOperator) -> Callable[[Tensor], Tensor]:
        return lambda v: (of @ torch.cat([v, v.new_zeros(of.shape[1] - n)]))[:n]

    return LinearOperator((n, n), block(A), block(A.T), dtype=A.dtype, device=A.device)


def state_weight(snapshot: Snapshot) -> Tensor:
    """Weights ``(1, r)`` of the norm ``||(v, r m)||``: r is how far a unit of the momentum buffer moves a parameter.

    By the optimizer's own step alone, also where no buffer is there yet, and at rate 0 as at the group's
    ``initial_lr``: a weight without the units of the parameters would make the norm depend on their scale, and jump
    when the buffer appears.

    Args:
        snapshot: the step.

    Returns:
        ``(P,)``, or ``(2P,)`` where there is momentum: what else the optimizer remembers has no part in the norm. r is
        1 where a buffer would never move anything.

    Cost: no gradient.
    """
    optimizer = known_optimizer(snapshot)
    rule = formula_of(optimizer)
    like = clipped_gradient(snapshot)
    like = like.to(torch.promote_types(like.dtype, torch.float32))
    if rule is None or not any(map(rule.momentum, optimizer.param_groups)):
        return torch.ones_like(like)
    step, size = _formula_tangent(snapshot, begun=True)
    unit = like.new_zeros(size)
    unit[len(like) : 2 * len(like)] = 1.0
    reach = step(unit, torch.zeros_like(like))[: len(like)].abs()
    return torch.cat([torch.ones_like(like), torch.where(reach > 0, reach, 1.0)])
