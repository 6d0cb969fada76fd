"""What each parameter adds to the trace of a Gram matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor


class Traces(Mapping[str, float]):
    """The trace of each parameter's share in K, by name; computed where somebody asks, as where decays differ.

    Args:
        names: of all parameters.
        shares: of those that have one.
    """

    def __init__(self, names: Iterable[str], shares: Mapping[str, Tensor]):
        self._names, self._shares = [*names], shares

    @cached_property
    def _values(self) -> dict[str, float]:
        traces = torch.stack([share.trace() for share in self._shares.values()]).tolist()
        return dict.fromkeys(self._names, 0.0) | dict(zip(self._shares, traces))

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
