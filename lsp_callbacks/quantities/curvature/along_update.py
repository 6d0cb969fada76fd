"""What quantities share that look at the loss of a step's own batch along its update, once that was made."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.taken_step import TakenStep


class AlongUpdate(Quantity):
    """A quantity that begins a measurement before an update and completes it after that: see `Quantity.awaited`.

    Args:
        check_every: of so many updates of the metric, the first compares what is replayed with the step.
    """

    window = 2
    weight = 0.3

    def __init__(self, check_every: int):
        super().__init__()
        self.check_every = whole("check_every", check_every, 1)

    @property
    @abstractmethod
    def is_first(self) -> bool:
        """Whether nothing was measured yet."""

    @property
    def checks(self) -> float:
        """How many checks the next measurement makes."""
        return 1.0 if self.is_first else 1 / self.check_every

    def check(self, snapshot: Snapshot) -> None:
        if snapshot.run.unsupported and not snapshot.run.updates_elsewhere:  # any update will do
            raise Unmeasurable(snapshot.run.unsupported)

    def update(self, snapshot: Snapshot) -> None:
        """Complete the measurement of the step before, if this step follows it; otherwise begin one of this step."""
        self.complete = False
        if self.awaited is not None and snapshot.follows(self.awaited.step):
            self.after_update()
            if self.complete:
                return
        self.awaited = None
        self.awaited = self.begun(snapshot, is_checked=self.is_first or (self.update_count - 1) % self.check_every == 0)

    def begun(self, snapshot: Snapshot, *, is_checked: bool) -> TakenStep:
        """Return what is kept of a step whose update comes next."""
        return TakenStep(snapshot, check=is_checked)

    def after_update(self) -> None:
        """Complete the measurement of a step whose update was made; one that has moved nothing gives no reading."""
        taken, self.awaited = self.awaited, None
        if taken is not None and taken.has_moved():
            self.measure(taken)

    @abstractmethod
    def measure(self, taken: TakenStep) -> None:
        """Measure along the update, and `finish`."""

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self.awaited = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"awaited": None}  # a replay cannot be copied
