"""Several optimizers that take turns under manual optimisation: from Lightning's hooks to each player's snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.random_state import RandomState
from lsp_callbacks.callbacks.lightning_step import step_loss
from lsp_callbacks.step.fingerprint import identical
from lsp_callbacks.step.pending_step import LossFn, PendingStep
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


def check_losses(losses: Mapping[str, LossFn]) -> None:
    """Refuses bad names and entries.

    Raises:
        ValueError: fewer than two players, a name with "/", a loss that cannot be called.
    """
    if len(losses) < 2:
        raise ValueError(f"loss_fn={dict(losses)!r}: name two players or more, or pass the one loss itself")
    for name, loss in losses.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"loss_fn: {name!r} is no name of a player: give a string without '/'")
        if not callable(loss):
            raise ValueError(f"loss_fn[{name!r}]={loss!r}: give a function (module, batch) -> loss")


class Game:
    """Whose step it is, and what must be kept from before it.

    What a step begins with (buffers, random state, parameters) is noted at the start of a batch and after each update.

    Args:
        trainer: Lightning's, when training begins.
        losses: of the players, in the order in which ``configure_optimizers`` returns their optimizers.
        pending: a new `PendingStep` if the coming step is to be measured, otherwise None; it raises nothing.
        warn_instead_of_raise: within which nothing is raised.

    Raises:
        ValueError: if there are not as many losses as optimizers.
    """

    def __init__(
        self,
        trainer: Any,
        losses: Mapping[str, LossFn],
        pending: Callable[[], PendingStep | None],
        warn_instead_of_raise: Callable[[str], contextlib.AbstractContextManager[None]],
    ):
        if len(losses) != len(trainer.optimizers):
            raise ValueError(
                f"loss_fn names {len(losses)} players ({', '.join(losses)}), configure_optimizers returns "
                f"{len(trainer.optimizers)} optimizers: name one for each, in their order"
            )
        self.optimizers: dict[str, torch.optim.Optimizer] = dict(zip(losses, trainer.optimizers))
        self._trainer, self._losses, self._new, self._harmless = trainer, losses, pending, warn_instead_of_raise
        self._moving = {name: {id(p) for p in _held(one) if p.requires_grad} for name, one in self.optimizers.items()}
        self._trusted: set[str] = set()
        self._pending: PendingStep | None = None
        self._marks: dict[int, Tensor] = {}
        self._interrupted = self._later = False
        self._batch: Any = None
        self._start: RandomState | None = None
        self._hooks = [one.register_step_post_hook(self._after_update) for one in trainer.optimizers]

    def close(self) -> None:
        """Takes the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()

    def players(self) -> list[Player]:
        """Each of them."""
        return [Player(name, self.optimizers) for name in self.optimizers]

    def begin(self, batch: Any) -> None:
        """A batch, before any forward pass on it."""
        left, self._pending = self._pending, None
        self._interrupted = left is not None and left.settle(self._parameters())
        self._batch, self._start, self._later = copied(batch), RandomState(), False
        self._keep()

    def _after_update(self, *_: Any) -> None:
        if self._start is None:  # nobody has seen the batch
            return
        with self._harmless("the step after an update could not be kept for a replay"):
            self._interrupted, self._later = False, True
            self._keep()

    def _keep(self) -> None:
        self._pending, self._marks = self._new(), {}
        if self._pending is not None:
            # A copy for each step, as replays must not see what others have done to it.
            self._pending.add(self._batch, lambda module, batch: None)
            self._marks = {id(p): _sum(p.grad) for p in self._parameters() if p.grad is not None}

    def drop(self) -> None:
        """The step is not taken, or not measured."""
        self._pending = None

    @contextlib.contextmanager
    def turn(self, optimizer: torch.optim.Optimizer) -> Iterator[Callable[..., Snapshot] | None]:
        """While one player's step is measured, the parameters of all players can be differentiated.

        Gives a function of the step's number and the ``previous`` one to its `Snapshot`, or None if nothing was kept.
        """
        name = next(name for name, one in self.optimizers.items() if one is optimizer)
        self._moving[name] = {id(p) for p in _held(optimizer) if p.requires_grad}
        moving = set().union(*self._moving.values())
        before = [(p, p.requires_grad) for p in self._parameters()]
        pending, self._pending = self._pending, None
        try:
            for p, _ in before:
                p.requires_grad_(id(p) in moving)
            yield None if pending is None else partial(self._snapshot, name, pending)
        finally:
            for p, required in before:
                p.requires_grad_(required)

    def _snapshot(self, name: str, pending: PendingStep, step: int, *, previous: int | None) -> Snapshot:
        moved = pending.settle(self._parameters()) or self._interrupted
        player = Player(name, self.optimizers, interrupted=INTERRUPTED if moved else None, trusted=self._trusted)
        mismatch = f"player {name!r}: {SIMULTANEOUS}" if self._simultaneous(name) else None
        loss = step_loss(self._trainer, self._losses[name], 0)
        parts = pending.parts = [replace(part, loss=loss) for part in pending.parts]
        snapshot = pending.snapshot(step, self.optimizers[name], mismatch=mismatch, player=player, previous=previous)
        # Noise may have been drawn once for all players.
        if pending.module_copy is None or self._start is None or not self._later:
            return verified_player_step(snapshot)
        earlier = [replace(part, random_state=self._start) for part in parts]
        return verified_player_step(snapshot, pending.run.ranks.private(replayer(pending.module_copy, earlier)))

    def _simultaneous(self, name: str) -> bool:
        own = [p for p in _held(self.optimizers[name]) if p.grad is not None and id(p) in self._marks]
        there = [p for p in own if bool(self._marks[id(p)] != 0)]
        return bool(there) and all(identical(_sum(p.grad), self._marks[id(p)]) for p in there)

    def _parameters(self) -> list[Any]:
        """Of all players, each once."""
        return list({id(p): p for one in self.optimizers.values() for p in _held(one)}.values())


def _held(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _sum(gradient: Tensor | None) -> Tensor:
    """A fingerprint."""
    assert gradient is not None
    return gradient.detach().to_dense().abs().sum(dtype=torch.float32)
