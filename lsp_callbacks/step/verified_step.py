"""Steps whose loss nobody observed: they are verified by their gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.compared_gradients import check_gradient
from lsp_callbacks.step.flat import flatten, split
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot

#: Relative difference of a player's gradient from its replay's: rounding, but not what another player's update does.
_PLAYER_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def verified(snapshot: Snapshot) -> Snapshot:
    """Return a step whose loss nobody observed, with the loss of a replay whose gradient was found to be the step's.

    With a ``clipping`` the gradient may be clipped already: then the replay's takes its place. If it is another one
    (the loop clips in another way, or differentiates another loss), what needs the update is not supported. Failures
    to replay are left to the quantities.

    Cost: one gradient.
    """
    try:
        loss, gradient = snapshot.run.ranks.together(lambda: replayed_gradient(snapshot))
    except Exception:
        return snapshot
    seen = replace(snapshot, loss=loss)
    try:
        check_gradient(seen, gradient)
    except Unmeasurable as error:
        if snapshot.clipping is None or snapshot.gradient is None or snapshot.unsupported:
            return replace(seen, mismatch=snapshot.mismatch or str(error))
        clipping = snapshot.clipping
        groups = [] if snapshot.optimizer is None else snapshot.optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        if clipping.kind == "norm" and not all(id(p) in held for p in snapshot.parameters.values()):
            reason = "gradients are clipped together with those of parameters that the optimizer does not hold"
            return replace(seen, mismatch=reason)
        try:
            check_gradient(seen, clipping(gradient))
        except Unmeasurable:
            return replace(seen, mismatch=str(error))
        return replace(seen, gradient=named_gradient(gradient, snapshot))
    return seen


def verified_player_step(snapshot: Snapshot, *others: Callable[[], Tensor]) -> Snapshot:
    """Return a player's step with the loss of the first of several replays whose gradient is the step's own.

    The gradients of the other players' parameters, which the step does not use, become those of the replay. Where no
    replay gives the step's gradient, what needs the update is not supported.

    Args:
        snapshot: with its ``player``, without a loss.
        others: further replays.

    Cost: one gradient for each replay.
    """
    assert snapshot.player is not None
    first = None
    for replay in (snapshot.replay, *others):
        seen = replace(snapshot, replay=replay)
        joint = seen.joint
        try:
            loss, gradient = seen.run.ranks.together(lambda joint=joint: replayed_gradient(joint))  # type: ignore[misc]
        except Exception:
            return snapshot
        replayed = dict(zip(joint.parameters, split(gradient, list(joint.parameters.values()))))
        given = seen.gradient if seen.gradient is not None else replayed
        merged = replayed | {name: given[name] for name in seen.parameters}
        seen = replace(seen, loss=loss, gradient=merged)
        first = first or seen
        flat = flatten([replayed[name] for name in seen.parameters], list(seen.parameters.values()))
        with contextlib.suppress(Unmeasurable):
            check_gradient(seen, flat, tolerance=_PLAYER_TOLERANCE.get(flat.dtype, 0.1) if seen.graph.full else 0.1)
            return seen
    assert first is not None
    reason = (
        f"the gradient of player {snapshot.player.name!r} is not that of its loss_fn: it was clipped, or belongs to "
        "parameters before another player's update, or the loss draws random numbers in another order (put the noise "
        "into the batch, or draw it from a generator that the module keeps)"
    )
    return replace(first, mismatch=snapshot.mismatch or reason)


def named_gradient(flat: Tensor, step: Snapshot) -> dict[str, Tensor | None]:
    """Return a flat gradient by name; None where the step had none: the optimizer skips those parameters."""
    gradient = step.gradient or {}
    pieces = split(flat, list(step.parameters.values()))
    return {name: None if gradient.get(name) is None else piece for name, piece in zip(step.parameters, pieces)}
