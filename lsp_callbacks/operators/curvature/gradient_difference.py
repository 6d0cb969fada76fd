"""A difference of two gradients of one step's loss, and why it may not be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class Untrusted(Exception):
    """A difference that may be wrong, by rounding or by a kink."""


@dataclass(frozen=True)
class Difference:
    """``grad L(theta + e u) - grad L(theta)`` along a unit vector u.

    Attributes:
        change: the difference itself.
        distance: e.
        slope: ``||change|| / e``.
        defect: ``L(theta + e u) - L - e (g + g') u / 2``, which vanishes like ``e^3 D^3L / 12`` on a smooth loss.
    """

    change: Tensor
    distance: float
    slope: float
    defect: float
