"""The Jacobian of one optimizer's step, over the parameters and the states of all players of a game."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import Comparison
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, unit
from lsp_callbacks.operators.curvature.central_difference import central_difference
from lsp_callbacks.operators.curvature.hessian import Method, hessian
from lsp_callbacks.operators.trajectory.formula_tangent import blocks_of
from lsp_callbacks.operators.trajectory.step_jacobian import step_tangent
from lsp_callbacks.operators.trajectory.update_rules import formula
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.players import Player
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot

#: Relative defect of an exact product that kinks can explain, which a difference crosses; a detached path lacks more.
TOLERANCE = 0.1


def require_game(snapshot: Snapshot) -> Player:
    """Return the player whose step it is.

    Raises:
        Unmeasurable: no player, an optimizer without a formula, or a step that is not supported.
    """
    if snapshot.player is None:
        raise Unmeasurable("the snapshot has no player: pass player=... to the Snapshot")
    snapshot.require_optimizer()
    for optimizer in snapshot.player.optimizers.values():
        formula(optimizer)
    return snapshot.player


def joint_jacobian(snapshot: Snapshot, *, method: Method = "auto") -> LinearOperator:
    """Return ``A_i``, the derivative of player i's step by the parameters and optimizer states of all players.

    With ``theta_i' = U_i(theta_i, grad_i L_i(theta), s_i)`` it maps ``z = (v, s_1, s_2, ...)`` onto itself: v displaces
    the parameters of all players, in the order of the module; s_j is one block for each tensor of the state of player
    j's optimizer, as large as its parameters, see `state_blocks`. The other players' part stays; player i's moves by
    `step_tangent` with ``dg = (H_i v)_i``, rows of the Hessian of L_i over all parameters: second derivatives are
    symmetric, so these are ``d(grad_i L_i) v``. The product ``A_n ... A_1`` over a turn is the joint Jacobian, which
    couples the players.

    A loss that detaches the other players (``.detach()`` for speed) has the right gradient and a wrong ``dg``: exact
    products would miss it without an error. So once for each player one of them is compared with a central difference
    of the player's gradient.

    Args:
        snapshot: a step with its ``player``, before the update.
        method: of the Hessian products.

    Returns:
        A square operator without adjoint, of the same size for each player.

    Raises:
        Unmeasurable: see `require_game`; a loss that detaches other players; parameters that were moved between steps.

    Cost: one Hessian product over all players; the comparison up to 8 gradients, once a run.

    Source: Mescheder et al. 2017, "The Numerics of GANs", for the Jacobian of simultaneous steps; here they alternate.
    """
    player, joint = require_game(snapshot), snapshot.joint
    if player.interrupted:
        raise Unmeasurable(player.interrupted)
    H, (tangent, _) = hessian(joint, method=method), step_tangent(snapshot)
    places = _places(snapshot, player.name)
    if player.name not in player.trusted:
        _require_coupling(snapshot, places)
    n, start = H.shape[0], H.shape[0]
    for name, optimizer in player.optimizers.items():
        end = start + len(blocks_of(optimizer)) * len(_places(snapshot, name))
        if name == player.name:
            first, last = start, end
        start = end

    def product(z: Tensor) -> Tensor:
        new = z.clone()
        moved = tangent(torch.cat([z[places], z[first:last]]), (H @ z[:n])[places])
        new[places], new[first:last] = moved[: len(places)], moved[len(places) :]
        return new

    return LinearOperator((start, start), product, dtype=H.dtype, device=H.device)


def _places(snapshot: Snapshot, name: str) -> Tensor:
    """Return the indices of a player's parameters among those of all."""
    assert snapshot.player is not None
    groups = snapshot.player.optimizers[name].param_groups
    held, indices, end = {id(p) for group in groups for p in group["params"]}, [], 0
    for p in snapshot.joint.parameters.values():
        start, end = end, end + p.numel()
        if id(p) in held:
            indices.append(torch.arange(start, end, device=p.device))
    if not indices:
        raise Unmeasurable(f"player {name!r} has no parameter that requires a gradient: leave it out of loss_fn")
    return torch.cat(indices)


def _require_coupling(snapshot: Snapshot, places: Tensor) -> None:
    """Raise an error if ``d(grad_i L_i) v`` is not a central difference, v among the other players' parameters."""
    player, joint = snapshot.player, snapshot.joint
    assert player is not None
    if not joint.graph.full:
        raise Unmeasurable(
            "whether the loss of a player detaches the other players' parameters cannot be checked in half precision: "
            "train some steps in float32 to measure, or leave this quantity out"
        )
    H = hessian(joint, method="exact")
    parameters = list(joint.parameters.values())
    noise = torch.randn(H.shape[1], generator=snapshot.generator("reach"), dtype=H.dtype).to(H.device)
    theta = flatten(parameters, parameters).detach().to(H.dtype)
    gradient = replayed_gradient(snapshot)[1]

    def is_confirmed(v: Tensor, whose: str) -> bool:
        if not bool(v.any()):  # the player holds all parameters
            return True
        image = (H @ v)[places]
        for far in (8.0, 1.0, 1 / 8):  # the first resolves small couplings, the last crosses few kinks
            central, distance = central_difference(joint, v, far)
            comparison = Comparison.of(image, central[places], gradient, distance)
            if comparison.defect <= TOLERANCE * comparison.size:
                return True
            if far > 1 and comparison.lost:
                raise Unmeasurable(
                    f"whether the loss of player {player.name!r} detaches {whose} parameters cannot be checked at this "
                    "step: they change its gradient by less than rounding does"
                )
        return False

    # A random direction changes little in a large network; shrinking all weights changes much.
    others = unit(_others(noise, places) + _others(theta, places))
    if not is_confirmed(others, "the other players'"):
        raise Unmeasurable(
            f"the loss of player {player.name!r} detaches the other players' parameters (.detach(), torch.no_grad(), "
            ".data), though its gradient depends on them: do not detach them in its loss_fn; the gradient of its own "
            "parameters does not change"
        )
    if joint.graph.stopped and not is_confirmed(unit(_own(noise, places) + _own(theta, places)), "its own"):
        raise Unmeasurable(
            f"the loss of player {player.name!r} depends on its own parameters by way of tensors without a graph, made "
            f"by {', '.join(joint.graph.stopped)}: leave this quantity out, or compute them with a graph"
        )
    player.trusted.add(player.name)


def _others(vector: Tensor, places: Tensor) -> Tensor:
    """Return the unit vector with zeros at the player's parameters."""
    return unit(vector.index_fill(0, places, 0.0))


def _own(vector: Tensor, places: Tensor) -> Tensor:
    """Return the unit vector with zeros at the other players' parameters."""
    return unit(torch.zeros_like(vector).index_copy(0, places, vector[places]))
