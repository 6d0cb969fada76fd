"""What differences of gradients have shown along a run, for the distances of later ones."""

from __future__ import annotations

from dataclasses import dataclass
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


#: By what the differences are of: the player, whether rates differ, whether products are added to a unit vector.
KnownScales = dict[tuple[Any, ...], Scale]
