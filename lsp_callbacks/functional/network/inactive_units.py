"""Units that no longer learn: dead and saturated ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lsp_callbacks.functional.network.activations import flat

#: A ReLU at its initialisation is silent on n rows with probability 2^-n: on fewer rows the shares mean nothing.
LEAST_ROWS = 8


@dataclass(frozen=True)
class InactiveUnits:
    """Units of one activation that no longer learn.

    Attributes:
        dead: ``(units,)``: the slope is exactly 0 in every row; no gradient passes.
        saturated: ``(units,)``: flat in every row, but not dead.
        flat: share of all slopes, over rows and units, that are flat.
    """

    dead: Tensor
    saturated: Tensor
    flat: Tensor


def inactive_units(slopes: Tensor, largest: float = 1.0) -> InactiveUnits:
    """Return which units are dead or saturated, from the slopes ``phi'`` of an activation.

    Flat is a slope below 1/20 of the largest one. Dead are ReLU units below 0 for all of the batch, those of ReLU6
    beyond either end, and tanh or sigmoid so far out that their slope is rounded to 0.

    Args:
        slopes: ``(rows, units)``: samples and positions, features or channels.
        largest: ``sup |phi'|``.

    Raises:
        ValueError: below 8 rows.

    Source: Glorot & Bengio 2010, Sec. 3 (saturation); Lu et al. 2020 (dying ReLU).

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import inactive_units
        >>> slopes = torch.tensor([[0.0, 1.0, 0.01]]).expand(8, -1)
        >>> result = inactive_units(slopes)
        >>> result.dead.tolist(), result.saturated.tolist(), round(float(result.flat), 4)
        ([True, False, False], [False, False, True], 0.6667)
    """
    if len(slopes) < LEAST_ROWS:
        raise ValueError(
            f"{len(slopes)} rows cannot tell a dead unit from one that is silent by chance: give {LEAST_ROWS}"
        )
    low = flat(slopes, largest)
    dead = (slopes == 0).all(0)
    return InactiveUnits(dead, low.all(0) & ~dead, low.double().mean())
