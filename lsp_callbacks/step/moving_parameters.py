"""Frozen parameters that steps move before their update, as those of a momentum encoder, and their copies."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class MovingParameter:
    """A frozen parameter that the steps of a run move, and its copy, which replays may move.

    Attributes:
        original: of the module that is trained.
        copy: of the module that replays run.
    """

    def __init__(self, original: nn.Parameter):
        self.original = original
        self.copy = nn.Parameter(original.detach().clone(), requires_grad=False)
        self.follow()

    def follow(self) -> None:
        """Take the value that a step begins with."""
        self._value = self.original.detach().clone()

    def restore(self) -> None:
        """Put that value back."""
        self.copy.data = self._value.clone()


def moved_together(module: nn.Module, moved: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return frozen parameters that were moved, with all of the largest frozen modules that hold any of them.

    At the first step a momentum encoder equals what it follows, and most of it does not move.
    """
    together = {id(p): p for p in moved}
    for part in module.modules():
        held = {id(p): p for p in part.parameters()}
        if not held.keys().isdisjoint(together) and not any(p.requires_grad for p in held.values()):
            together |= held
    return list(together.values())
