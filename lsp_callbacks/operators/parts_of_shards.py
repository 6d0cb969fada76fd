"""How flat vectors over the parameters of a step with shards lie on the processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import trained_parameters
from lsp_callbacks.autograd.spread_tensors import part_of_whole
from lsp_callbacks.linalg.vector_parts import VectorParts
from lsp_callbacks.step.snapshot import Snapshot, computed_once


def parts_of_vectors(snapshot: Snapshot) -> VectorParts | None:
    """Return how flat vectors over a step's parameters lie on the processes; None where this one holds all of each."""
    return None if snapshot.held is None else parts_of_shards(snapshot)


@computed_once
def parts_of_shards(snapshot: Snapshot) -> VectorParts:
    """Return how flat vectors over the shards of a step lie on the processes.

    Under tensor parallelism some parameters are whole on each process, and others are not: then each number has a
    weight of its own, so that sums over all processes count it once.
    """
    shards, ranks, originals = snapshot.run.shards, snapshot.run.ranks, trained_parameters(snapshot.module)
    assert shards is not None
    shares = shares_of(snapshot)
    is_even = len(set(shares)) == 1
    factor = ranks.world * (shares[0] if is_even else 1.0)
    held = snapshot.parameters.values()
    each = None if is_even else torch.cat([torch.full((p.numel(),), s, device=p.device) for s, p in zip(shares, held)])

    def total(sums: Tensor) -> Tensor:
        (mean,) = ranks.mean(lambda: (sums.double().to(ranks.device),), "inner products")
        return (factor * mean).to(sums.device)

    def part(between: Callable[[int, int], Tensor]) -> Tensor:
        pieces, at = [], 0
        for p in originals.values():
            numbers = between(at, at + p.numel()).view(p.shape).to(p.device)
            pieces.append(part_of_whole(numbers, p).reshape(-1))
            at += p.numel()
        return torch.cat(pieces)

    return VectorParts(sum(p.numel() for p in held), total, part, each)


def shares_of(snapshot: Snapshot) -> list[float]:
    """Return one over how many processes hold the same numbers of each parameter of a step with shards."""
    assert snapshot.run.shards is not None
    return [1 / snapshot.run.shards.copies[name] for name in snapshot.parameters]
