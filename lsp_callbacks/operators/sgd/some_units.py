"""Gradients of a large matrix at some of its units, taken by size: products of rows from a part of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lsp_callbacks.operators.sgd.step_samples import sampled_rows

#: Of so many units of a layer, and of one in so many, gradients are formed at least.
FEWEST, ONE_IN = 32, 4
#: Weights of a layer up to which all of its units are.
FEW_ENTRIES = 2**13


@dataclass(frozen=True)
class Units:
    """Gradients ``(N, R, P)`` of a matrix, of which those of each unit, a row of the matrix, can be formed alone.

    Attributes:
        sizes: the sums of squares of what the gradients are products of: for each unit, and for each of its numbers.
        entries: from indices of units to their gradients, ``(N, R, m width)``.
    """

    sizes: Callable[[], tuple[Tensor, Tensor]]
    entries: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TakenUnits:
    """Units that stand for all of a matrix.

    Attributes:
        units: of each part of the samples.
        index: of those that were taken, ``(m,)``.
        weights: by which the squares of their gradients are multiplied, ``(m, width)``.
    """

    units: Sequence[Units]
    index: Tensor
    weights: Tensor


def take_units(units: Sequence[Units], scale: Tensor | None, fraction: float) -> TakenUnits | None:
    """Return which units stand for all in ``K_ij = sum_kl D_kl G_ikl G_jkl``; None where all are needed.

    A quarter of the units k, 32 at least, each with a probability in proportion to ``sum_il D_kl g_ik^2 a_il^2`` as far
    as that is below 1, and divided by it: the expectation of K is K, and its trace, to which each unit that is taken
    adds about as much, hardly changes.

    Args:
        units: of each part of the samples.
        scale: D, as many numbers as the matrix has; None is 1.
        fraction: in [0, 1), by chance.

    Cost: one pass over D.
    """
    sizes = [part.sizes() for part in units]
    of_units, of_numbers = (sum(others, first) for first, *others in zip(*sizes))
    count = max(FEWEST, -(-len(of_units) // ONE_IN))
    if count >= len(of_units):
        return None
    if scale is not None:
        scale = scale.reshape(len(of_units), -1)
        of_units = of_units * (scale @ of_numbers)
    index, chance = sampled_rows(of_units.double().cpu().numpy(), count, fraction)
    index, weights = index.to(of_units.device), (1 / chance).to(of_units)[:, None]
    return TakenUnits(units, index, weights.expand(-1, len(of_numbers)) if scale is None else weights * scale[index])
