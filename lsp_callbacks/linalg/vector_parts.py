"""Flat vectors of which each process holds a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VectorParts:
    """How flat vectors lie on several processes, which compute with them together.

    Attributes:
        size: how many numbers this process holds.
        total: from sums over the parts of each process to those over the whole vectors, the same on all processes.
        part: from a function that gives the numbers from one place to another, ``(start, stop) -> (stop - start,)``, to
            the part of the vector that this process holds; nothing is sent.
    """

    size: int
    total: Callable[[Tensor], Tensor]
    part: Callable[[Callable[[int, int], Tensor]], Tensor]
