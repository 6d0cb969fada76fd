"""What reads the graph of a step before the step itself differentiates it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from lsp_callbacks.step.snapshot import Snapshot


class GraphReader(ABC):
    """Takes from the graph of each loss of a step what a quantity needs; for those that do without a replay.

    Attributes:
        parameters: those that were trained when it saw the first loss, by name; none before it, or if nobody looked.
    """

    parameters: Mapping[str, nn.Parameter] = MappingProxyType({})

    @abstractmethod
    def saw_loss(self, loss: Tensor, *, samples: int | None, factor: float, micro_batches: int) -> None:
        """Read the graph of a micro-batch's loss, and leave no trace in it; raises nothing.

        Args:
            loss: that is differentiated next.
            samples: in the micro-batch; None if that is not known.
            factor: by which the loss was multiplied since it was the mean over these samples.
            micro_batches: in the step.
        """

    @abstractmethod
    def before_replays(self, snapshot: Snapshot) -> None:
        """Make of what was taken what needs less memory, before the step is replayed; what fails fails later."""

    @abstractmethod
    def release(self) -> None:
        """Let go of what was taken, as nothing more is made from it."""
