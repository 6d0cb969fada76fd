"""Base of the quantities that push directions through a window of consecutive steps."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from lsp_callbacks._validation import choice
from lsp_callbacks.operators.curvature.hessian import Method
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.step.snapshot import Snapshot


class Windowed(Quantity):
    """Quantity of a frame of directions that is pushed through consecutive steps."""

    needs_update = True

    def __init__(self, method: Method):
        super().__init__()
        self.method: Method = choice("method", method, *get_args(Method))
        self._frame: dict[str, Any] = {}
        # Start of the next alignment, for quantities that align with the sharp mode.
        self._mode: Tensor | None = None
        self._top: Tensor | None = None

    def check(self, snapshot: Snapshot) -> None:
        tangent_path(snapshot)

    def _continues(self, snapshot: Snapshot) -> bool:
        """Return whether the snapshot is the next step of the window under way."""
        return bool(self._frame) and snapshot.follows(self._frame["step"])

    def vectors(self) -> dict[str, Any]:
        return self._frame | ({} if self._mode is None else {"mode": self._mode, "top": self._top})

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        vectors = dict(vectors)
        self._mode, self._top = vectors.pop("mode", None), vectors.pop("top", None)
        self._frame = vectors
