"""What does not change in the autograd graph of a network from step to step."""

from __future__ import annotations

from typing import NamedTuple


class GraphKind(NamedTuple):
    """What does not change from step to step, and by which a graph is recognised.

    Attributes:
        nodes: their names, outputs first.
        sites: the names of the trainable parameters of each use, in the order of the graph.
        axes: of the samples in each use: first (0) or second (1).
        by_rows: whether gradients of some samples can be taken back alone.
        lengths: how many positions of each sample each use had, and at last the outputs.
    """

    nodes: tuple[str, ...]
    sites: tuple[tuple[str | None, ...], ...]
    axes: list[int]
    by_rows: bool = False
    lengths: tuple[int, ...] = ()

    def has_length(self, lengths: tuple[int, ...]) -> bool:
        """Return whether uses have as many positions as before, or as many for each of the outputs'.

        An expert is called with those tokens that are routed to it: as many as can be divided among the samples, by
        chance, and they are not theirs.
        """
        now, before = lengths[-1], self.lengths[-1]
        return self.by_rows or all(
            length == last or length * before == last * now for length, last in zip(lengths, self.lengths, strict=True)
        )
