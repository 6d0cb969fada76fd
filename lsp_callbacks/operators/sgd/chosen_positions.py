"""Which positions (tokens, pixels) of each sample are looked at, of those that the loss counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chosen:
    """What the rows of the samples look at.

    Attributes:
        positions: of each sample, ``(N, k)``; where the loss counts fewer than k, the others have rows of zeros.
        taken: indices of the samples that have rows.
        chance: by which probability each of those was taken.
        counted: how many positions of each sample the loss counts, ``(N,)``; None where it counts all of them.
    """

    positions: Tensor
    taken: Tensor
    chance: Tensor
    counted: Tensor | None = None


def positions_of(
    shape: torch.Size | tuple[int, ...], count: int, generator: torch.Generator, counts: Tensor | None = None
) -> Tensor:
    """Return so many positions of each sample, of those that it has, ``(N, k)``, by chance.

    Args:
        shape: ``(N, T)``.
        count: k, at most.
        generator: of the choice.
        counts: whether the loss counts a position, ``(N, T)``: padding and ignored labels come last. None is all.
    """
    if shape[1] == 1:
        return _first(shape[0])
    order = torch.rand(shape, generator=generator)
    if counts is not None:
        order += counts.logical_not().to(order)
    return order.argsort(1)[:, :count].sort(1).values


@lru_cache(maxsize=4)
def _first(samples: int) -> Tensor:
    return torch.zeros(samples, 1, dtype=torch.long)


def stands_for(counted: Tensor | None, length: int, looked: int) -> Tensor | float:
    """Return for how many positions of its sample a row stands, ``(N,)``, or one number for all samples.

    Args:
        counted: how many positions of each sample the loss counts; None where it counts all of them.
        length: T.
        looked: k.
    """
    if counted is None:
        return length / looked
    return counted.clamp_min(1) / counted.clamp(1, looked)


def rows_alone(counted: Tensor, length: int, looked: int) -> Tensor:
    """Return for how many positions each row would stand if it were the only one of its sample, ``(N, k)``."""
    stands = torch.as_tensor(stands_for(counted, length, looked), dtype=torch.float64)
    return (looked * stands)[:, None].expand(-1, looked)


def joined_counts(parts: list[Tensor | None], sizes: list[int], length: int) -> Tensor | None:
    """Return how many positions are counted of the samples of all parts; None where all are."""
    if all(part is None for part in parts):
        return None
    return torch.cat([torch.full((n,), length) if part is None else part.cpu() for part, n in zip(parts, sizes)])
