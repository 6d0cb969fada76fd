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
        total: from sums over the parts of each process, each `once`, to those over the whole vectors, the same on all
            processes.
        part: from a function that gives the numbers from one place to another, ``(start, stop) -> (stop - start,)``, to
            the part of the vector that this process holds; nothing is sent.
        shares: one over how many processes hold each number, ``(size,)``; None where those are as many for all.
    """

    size: int
    total: Callable[[Tensor], Tensor]
    part: Callable[[Callable[[int, int], Tensor]], Tensor]
    shares: Tensor | None = None

    def once(self, v: Tensor, power: float = 1.0) -> Tensor:
        """Return the part of a vector with which sums over all processes count each number once.

        Args:
            v: this process's part; returned itself where `total` sees to it.
            power: of the shares: 1/2 for a vector that is squared.
        """
        return v if self.shares is None else self.shares.to(v.dtype) ** power * v
