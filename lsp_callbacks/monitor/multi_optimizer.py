"""Several optimizers that take turns, each on a loss of its own: from their updates to a snapshot for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.monitor.training_loop import MicroBatchLoss
from lsp_callbacks.step.fingerprint import identical
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.players import Player
from lsp_callbacks.step.replay import copied, replayer
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.verified_step import verified_player_step

INTERRUPTED = (
    "parameters are moved between the steps of the optimizers (clipped weights, an average that is copied back): the "
    "derivative of that is not modelled"
)
SIMULTANEOUS = (
    "its gradient was computed before another player's update: simultaneous steps are not modelled; call each player's "
    "manual_backward after the other's step"
)


def check_losses(losses: Mapping[str, Any]) -> None:
    """Raise ValueError for fewer than two players, a name with "/" in it, or a loss that cannot be called."""
    if len(losses) < 2:
        raise ValueError(f"loss_fn={dict(losses)!r}: name two players or more, or pass the one loss itself")
    for name, loss in losses.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"loss_fn: {name!r} is no name of a player: give a string without '/'")
        if not callable(loss):
            raise ValueError(f"loss_fn[{name!r}]={loss!r}: give a function (module, batch) -> loss")


class Game:
    """The player whose step comes next, and what must be kept from before that step.

    What a step begins with (buffers, random state, parameters) is noted at the start of a batch and after each update.

    Args:
        optimizers: one for each player.
        losses: of the players by name, in the order of their optimizers.
        new_pending: returns a new `PendingStep` if the coming step is to be measured, otherwise None; raises nothing.
        warn_instead_of_raise: context in which nothing is raised, see `Monitor.warn_instead_of_raise`.

    Raises:
        ValueError: if there are not as many losses as optimizers.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        losses: Mapping[str, MicroBatchLoss],
        new_pending: Callable[[], PendingStep | None],
        warn_instead_of_raise: Callable[[str], contextlib.AbstractContextManager[None]],
    ):
        if len(losses) != len(optimizers):
            raise ValueError(
                f"loss_fn names {len(losses)} players ({', '.join(losses)}), configure_optimizers returns "
                f"{len(optimizers)} optimizers: name one for each, in their order"
            )
        self.optimizers: dict[str, torch.optim.Optimizer] = dict(zip(losses, optimizers))
        self._losses, self._new_pending, self._warn_instead_of_raise = losses, new_pending, warn_instead_of_raise
        self._trained = {name: _trained(optimizer) for name, optimizer in self.optimizers.items()}
        self._trusted: set[str] = set()
        self._pending: PendingStep | None = None
        self._gradient_sums: dict[int, Tensor] = {}  # before the step, by parameter
        self._is_interrupted = self._is_after_update = False
        self._batch: Any = None
        self._batch_random_state: RandomState | None = None
        self._hooks = [optimizer.register_step_post_hook(self._after_update) for optimizer in optimizers]

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()

    def players(self) -> list[Player]:
        """Return each of the players."""
        return [Player(name, self.optimizers) for name in self.optimizers]

    def begin(self, batch: Any) -> None:
        """Take in a batch before any forward pass on it."""
        unused, self._pending = self._pending, None
        self._is_interrupted = unused is not None and unused.settle(self._parameters())
        self._batch, self._batch_random_state, self._is_after_update = copied(batch), RandomState(), False
        self._keep()

    def _after_update(self, *_: Any) -> None:
        if self._batch_random_state is None:  # nobody has seen the batch
            return
        with self._warn_instead_of_raise("the step after an update could not be kept for a replay"):
            self._is_interrupted, self._is_after_update = False, True
            self._keep()

    def _keep(self) -> None:
        self._pending, self._gradient_sums = self._new_pending(), {}
        if self._pending is not None:
            # A copy for each step, as replays must not see what others have done to it.
            self._pending.add(self._batch, lambda module, batch: None)
            self._gradient_sums = {id(p): _absolute_sum(p.grad) for p in self._parameters() if p.grad is not None}

    def drop(self) -> None:
        """Let go of a step that is not taken, or not measured."""
        self._pending = None

    @contextlib.contextmanager
    def turn(self, optimizer: torch.optim.Optimizer) -> Iterator[Callable[..., Snapshot] | None]:
        """Let the parameters of all players be differentiated while one player's step is measured.

        Yields a function of the step's number and the ``previous`` one to its `Snapshot`, or None if nothing was kept.
        """
        name = next(name for name, other in self.optimizers.items() if other is optimizer)
        self._trained[name] = _trained(optimizer)
        trained = set().union(*self._trained.values())
        before = [(p, p.requires_grad) for p in self._parameters()]
        pending, self._pending = self._pending, None
        try:
            for p, _ in before:
                p.requires_grad_(id(p) in trained)
            yield None if pending is None else partial(self._snapshot, name, pending)
        finally:
            for p, required in before:
                p.requires_grad_(required)

    def _snapshot(self, name: str, pending: PendingStep, step: int, *, previous: int | None) -> Snapshot:
        is_moved = pending.settle(self._parameters()) or self._is_interrupted
        player = Player(name, self.optimizers, interrupted=INTERRUPTED if is_moved else None, trusted=self._trusted)
        mismatch = f"player {name!r}: {SIMULTANEOUS}" if self._is_simultaneous(name) else None
        parts = pending.parts = [replace(part, loss=self._losses[name]) for part in pending.parts]
        snapshot = pending.snapshot(step, self.optimizers[name], mismatch=mismatch, player=player, previous=previous)
        # Noise may have been drawn once for all players.
        if pending.module_copy is None or self._batch_random_state is None or not self._is_after_update:
            return verified_player_step(snapshot)
        with_the_batchs_noise = [replace(part, random_state=self._batch_random_state) for part in parts]
        replay = replayer(pending.module_copy, with_the_batchs_noise)
        return verified_player_step(snapshot, pending.run.ranks.private(replay))

    def _is_simultaneous(self, name: str) -> bool:
        """Return True if the player's gradient is what it was before the step began."""
        before = self._gradient_sums
        parameters = [p for p in _held(self.optimizers[name]) if p.grad is not None and id(p) in before]
        nonzero = [p for p in parameters if bool(before[id(p)] != 0)]
        return bool(nonzero) and identical([_absolute_sum(p.grad) for p in nonzero], [before[id(p)] for p in nonzero])

    def _parameters(self) -> list[Any]:
        """Return the parameters of all players, each once."""
        return list({id(p): p for optimizer in self.optimizers.values() for p in _held(optimizer)}.values())


def _held(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _trained(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for p in _held(optimizer) if p.requires_grad}


def _absolute_sum(gradient: Tensor | None) -> Tensor:
    """Return a number that tells whether a gradient has changed."""
    assert gradient is not None
    return gradient.detach().to_dense().abs().sum(dtype=torch.float32)
