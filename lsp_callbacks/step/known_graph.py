"""What verified replays of a run have shown, for later steps that look the same."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_callbacks.autograd.graph import Graph

#: Steps in a row that must have been replayed to the last bit, before a step is not replayed for its graph alone; and
#: how many such steps may follow each other.
PASSED, SELDOM = 3, 8


@dataclass
class KnownGraph:
    """The graph of a run's loss, as verified replays have shown it.

    A replay of a step that is to show its graph alone costs a forward pass, and shows the same as at the step before:
    the graph is a property of the code. It is left out where the graph that the step itself has differentiated has the
    same properties as that of the steps that were replayed. What is measured with such a graph checks each of its
    replays by itself: a difference of gradients against the loss and the gradient of the step, the first exact product
    against both; so a ``training_step`` that begins to depend on something outside of it is found there.

    Attributes:
        of_step: properties of the graph that the last verified step itself has differentiated.
        of_replay: those of its replay, which shows what re-entrant checkpoints and the like hide.
        passed: verified steps in a row.
        used: steps that were not replayed since the last one that was.
    """

    of_step: Graph | None = None
    of_replay: Graph | None = None
    passed: int = 0
    used: int = 0

    def expected(self, of_step: Graph | None) -> Graph | None:
        """Return the graph of a step's replay; None where that has to be replayed.

        Args:
            of_step: properties of the graph that the step itself has differentiated; None if they were not seen.
        """
        if of_step is None or of_step != self.of_step or self.passed < PASSED or self.used >= SELDOM:
            return None
        self.used += 1
        return self.of_replay

    def verified(self, of_step: Graph | None, of_replay: Graph) -> None:
        """Note a step whose replay was right."""
        is_same = of_step == self.of_step and of_replay == self.of_replay
        self.passed = self.passed + 1 if is_same else 1
        self.of_step, self.of_replay, self.used = of_step, of_replay, 0

    def failed(self) -> None:
        """Note a step whose replay was wrong, or failed."""
        self.of_step, self.of_replay, self.passed, self.used = None, None, 0, 0
