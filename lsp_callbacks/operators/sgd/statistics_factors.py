"""What the statistics of a batch leave of each parameter's share in a Gram matrix that holds them fixed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from lsp_callbacks.operators.sgd.output_directions import OutputDirections
from lsp_callbacks.operators.sgd.per_sample_gradients import whole_seeds
from lsp_callbacks.step.probe_set import ProbeSet

#: Combinations of rows are taken back through the statistics in every so many readings.
RENEWED = 4
#: Of so many the mean is taken.
LAST = 5
#: Weight of a combination that would find a factor of 1, beside them: a chance zero is never believed.
CAUTION = 0.1


class StatisticsFactors:
    """By what factor each parameter's share of K is to be multiplied, from the last combinations of rows.

    With statistics held fixed the rows move all outputs of a batch alike, which the next normalisation undoes: the
    share of a scale or a shift is then several times too large. Rows combined with random signs c, taken back
    through the statistics, has ``||D^(1/2) J^T c||^2``, whose mean over c is the share's true trace, beside
    ``c^T K c`` of the held one. The ratio of their means is exactly 1 where no statistics come after the parameter.
    ``benchmarks/batch_statistics.py`` compares with rows that are taken back one by one.

    Attributes:
        values: the factors, by name; empty before the first combination.
    """

    def __init__(self) -> None:
        self._last: deque[Mapping[str, tuple[float, float]]] = deque(maxlen=LAST)
        self.values: dict[str, float] = {}

    def add(self, shares: Mapping[str, Tensor], signs: Tensor, squares: Mapping[str, float]) -> None:
        """Add a combination of rows.

        Args:
            shares: of the parameters in K, with the statistics held, by name.
            signs: c, ``(n R,)``.
            squares: ``||D^(1/2) J^T c||^2`` through the statistics, by name; 0 where that is missing.
        """
        every = torch.stack([*shares.values()]).double()
        c = signs.to(every)
        held, traces = ((every @ c) @ c).tolist(), every.diagonal(dim1=1, dim2=2).sum(1).tolist()
        if not math.isfinite(sum(held) + sum(squares.values())):
            return
        self._last.append(
            {name: (squares.get(name, 0.0) / t, h / t) for name, h, t in zip(shares, held, traces) if t > 0}
        )
        for name in shares:
            pairs = [of_names[name] for of_names in self._last if name in of_names]
            through, fixed = (sum(values) + CAUTION for values in zip(*pairs)) if pairs else (1.0, 1.0)
            self.values[name] = through / fixed

    @staticmethod
    def is_due(reading: int) -> bool:
        """Return whether a reading takes a combination of rows back: the first two, and every fourth."""
        return reading <= 2 or reading % RENEWED == 0


def squares_through_statistics(
    probes: ProbeSet, directions: OutputDirections, roots: Mapping[str, Tensor], signs: Tensor
) -> dict[str, float]:
    """Return ``||D^(1/2) J^T c||^2`` by parameter, through the statistics of each part.

    Args:
        probes: the samples.
        directions: what the rows stand for.
        roots: of the diagonal of D, by name.
        signs: c, of all rows.

    Cost: a forward and a backward pass.
    """
    squares, lo = dict.fromkeys(probes.parameters, 0.0), 0
    for index, part in enumerate(probes.parts):
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            outputs = part().outputs
        seeds = directions.seeds[index]
        taken = directions.taken[index][0] if index in directions.taken else torch.arange(len(outputs))
        weights = torch.zeros(len(outputs), len(seeds), dtype=signs.dtype)
        weights[taken] = signs[lo : lo + len(taken) * len(seeds)].view(-1, len(seeds))
        lo += len(taken) * len(seeds)
        total = whole_seeds(seeds, weights.to(outputs), outputs)
        whole = torch.autograd.grad(outputs, list(probes.parameters.values()), total, allow_unused=True)
        for name, g in zip(probes.parameters, whole):
            if g is not None:
                root_g = roots[name] * g.to_dense()
                squares[name] += float(torch.linalg.vector_norm(root_g, dtype=torch.float64)) ** 2
    return squares


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Return so many numbers that are -1 or 1."""
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1
