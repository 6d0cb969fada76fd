"""Several optimizers that take turns, each on a loss of its own, as in a GAN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from lsp_callbacks.errors import Unmeasurable


@dataclass(frozen=True, eq=False)
class Player:
    """The optimizer that makes a step, of several that take turns on losses of their own.

    Players take turns: ``theta_1' = theta_1 - eta_1 grad_1 L_1(theta_1, theta_2)``, then ``theta_2' = theta_2 - eta_2
    grad_2 L_2(theta_1', theta_2)``. Each of these is a step, with a `Snapshot` of its own.

    Args:
        name: of the player.
        optimizers: of all players by name; a parameter may be held by several.
        joint: whether the snapshot looks at the parameters of all players; otherwise at the player's own.
        interrupted: why the parameters are not where the step before has left them (clipped weights); None if they are.
        trusted: players whose losses were found to let the others' parameters through; one set for a whole run.

    Raises:
        ValueError: if the name is not among the optimizers.
    """

    name: str
    optimizers: Mapping[str, torch.optim.Optimizer]
    joint: bool = False
    interrupted: str | None = None
    trusted: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self):
        if self.name not in self.optimizers:
            raise ValueError(f"name={self.name!r}: the players are {', '.join(self.optimizers)}")

    def holds(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter is one of those that the snapshot looks at."""
        return id(parameter) in self._held

    @cached_property
    def _held(self) -> set[int]:
        optimizers = self.optimizers.values() if self.joint else [self.optimizers[self.name]]
        return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def require_one(player: Player | None) -> None:
    """Refuse several optimizers that take turns, for what is a property of one loss and one optimizer.

    Raises:
        Unmeasurable: if there is a player.
    """
    if player is not None:
        raise Unmeasurable(
            f"several players ({', '.join(player.optimizers)}) take turns on losses of their own, and no single "
            "loss describes their joint training: use lyapunov_trajectory, and sharpness for each by itself"
        )
