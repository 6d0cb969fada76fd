"""What differences of gradients have shown along a run, for the distances of later ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """Sizes that hardly change from one measured step to the next.

    Attributes:
        seen: the largest change of a gradient over the distance.
        used: the same of the product that is made of it.
        loss: its size.
        rounding: by how much the loss was found to be rounded; 0 where that was not seen.
    """

    seen: float = 0.0
    used: float = 0.0
    loss: float = 0.0
    rounding: float = 0.0


class KnownScales:
    """The scales of earlier steps.

    A step is told what the steps before it have shown, never what was measured in it: its numbers do not depend on the
    order of its measurements. Keys are what the differences are of: the player, whether rates differ, whether products
    are added to a unit vector.
    """

    def __init__(self) -> None:
        self._noted: dict[tuple[Any, ...], tuple[int, Scale, Scale]] = {}  # of the last step, and of those before it

    def before(self, step: int, key: tuple[Any, ...]) -> Scale:
        """Return what the steps before this one have shown."""
        at, scale, earlier = self._noted.get(key, (-1, Scale(), Scale()))
        return scale if at < step else earlier if at == step else Scale()

    def note(self, step: int, key: tuple[Any, ...], scale: Scale) -> None:
        """Keep what a step has shown: the largest of each size, whichever was seen first."""
        at, noted, earlier = self._noted.get(key, (-1, Scale(), Scale()))
        if at == step:
            scale = Scale(*map(max, astuple(noted), astuple(scale)))
        self._noted[key] = (step, scale, earlier if at == step else noted if at < step else Scale())

    def clear(self) -> None:
        """Forget everything."""
        self._noted.clear()

    def state(self) -> list[tuple]:
        """Return numbers for a checkpoint."""
        return [(key, at, astuple(scale), astuple(earlier)) for key, (at, scale, earlier) in self._noted.items()]

    def load(self, state: Iterable[tuple]) -> None:
        """Take back what `state` gave."""
        self._noted = {tuple(key): (at, Scale(*scale), Scale(*earlier)) for key, at, scale, earlier in state}
