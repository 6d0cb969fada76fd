"""A difference of two gradients of one step's loss, the product that is made of it, and why it may not be trusted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Products:
    """How the Hessian products of one step were found so far.

    Attributes:
        exact: the path of exact products, see `path_taken`; empty before the first.
        differences: the path of finite differences, which may have become that of exact products; likewise.
        untrusted: whether a difference failed its checks, so that exact products have taken over.
        taken: how many products were differences; those before exact ones took over stay part of what was measured.
    """

    exact: str = ""
    differences: str = ""
    untrusted: bool = False
    taken: int = 0
    _used: dict[int, Any] = field(default_factory=dict, repr=False)

    def note(self, differences: Any) -> None:
        """Count a product that differences have made."""
        self.taken += 1
        self._used[id(differences)] = differences

    def end_run(self) -> None:
        """Let go of the vectors that the products so far have left, once no further ones are made of the same start."""
        for differences in self._used.values():
            differences.release()
        self._used.clear()
