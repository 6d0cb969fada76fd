"""Readings of a network that no longer tells its inputs apart."""

from __future__ import annotations

import math

from torch import Tensor

from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.quantities.key import Key

#: A network has collapsed when its samples were alike in so many readings in a row, over so many steps at least: a few
#: samples beside them may bring it back.
READINGS, STEPS = 3, 50
COLLAPSED = Key(
    "1 where the outputs no longer depend on the inputs, for three readings and 50 steps; 0.5 before that.",
    "",
    "At 1 start again with a lower learning rate: a collapsed network looks stable, but no longer learns.",
    optional=True,
    threshold=0.5,
)


def collapse(alike: Tensor, since: Tensor, *, step: int, is_alike: bool) -> tuple[float, Tensor, Tensor]:
    """Return what is reported after one more reading, and the new count of readings and the step of the first.

    Args:
        alike: how many readings in a row the samples were alike.
        since: step of the first of them.
        step: of this reading.
        is_alike: whether they are.
    """
    if not is_alike and not alike:
        return 0.0, alike, since
    alike = alike + 1 if is_alike else scalar(0.0)
    since = since if float(alike) > 1 else scalar(float(step))
    lasting = float(alike) >= READINGS and step - float(since) >= STEPS
    return 0.0 if not alike else 1.0 if lasting else 0.5, alike, since


def none_yet() -> tuple[Tensor, Tensor]:
    """Return the count of readings and the step of the first, before any."""
    return scalar(0.0), scalar(math.nan)
