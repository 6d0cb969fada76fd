"""How many bytes a measurement may take beside training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """Bytes beside training.

    Attributes:
        wanted: within which a graph is made piece by piece, where the batch can be divided.
        most: above which a measurement is refused; on a small network it is larger.
    """

    wanted: float = math.inf
    most: float = math.inf
