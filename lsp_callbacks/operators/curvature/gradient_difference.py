"""A difference of two gradients of one step's loss, the product that is made of it, and why it may not be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lsp_callbacks.autograd._torch_internals import version


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


@dataclass(frozen=True)
class LastProduct:
    """The product before, with which the next must be symmetric.

    Attributes:
        v: the vector.
        size: its norm.
        image: its product, which belongs to the caller.
        versions: of both when the image was handed out.
    """

    v: Tensor
    size: float
    image: Tensor
    versions: tuple[int, int]

    @property
    def unchanged(self) -> bool:
        """Return whether neither was changed in place since then."""
        return (version(self.v), version(self.image)) == self.versions
