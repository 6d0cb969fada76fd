"""Where Lightning's steps begin and end, and how it numbers them."""

from __future__ import annotations

from typing import Any

from lsp_callbacks.callbacks._lightning_internals import is_accumulating
from lsp_callbacks.monitor.observer import StepObserver


class StepNumbers:
    """Counts the steps of an observer as Lightning does: each step of a player, otherwise one in a batch.

    Args:
        observer: whose ``step`` is counted.
        accumulate: under manual optimisation, the batches in a step; None where each is one, or the trainer counts.
    """

    def __init__(self, observer: StepObserver, accumulate: int | None):
        self._observer, self._accumulate = observer, accumulate
        self._is_counted, self._is_over, self._follows_trainer = False, True, False

    def reset(self) -> None:
        """Count from 0, as in a first run."""
        self._observer.step, self._observer.previous = 0, None

    def begin_run(self, trainer: Any, *, is_game: bool) -> None:
        """Take the number of the first step from a run that is resumed without a state of ours."""
        self._is_over = True  # also where the run before was interrupted within a step
        # Under manual optimisation with one loss a step is a batch with updates, as in Lightning's rows.
        is_automatic = trainer.lightning_module.automatic_optimization and bool(trainer.optimizers)
        self._follows_trainer = is_game or is_automatic
        if not self._observer.step:
            self._observer.step = trainer.global_step // (1 if is_game else max(1, len(trainer.optimizers)))

    def begin_batch(self, trainer: Any, batch_idx: int) -> bool:
        """Return True if the batch is the first of a step."""
        if self._follows_trainer:  # Lightning also counts the steps that nobody shows us
            self._observer.step = trainer.global_step
        self._is_counted = False
        if self._accumulate is None:
            return batch_idx % trainer.accumulate_grad_batches == 0
        begins, self._is_over = self._is_over, False
        return begins

    def end_batch(self, trainer: Any) -> bool:
        """Return True if the batch that ends now is the last of its step; count one that nobody has shown us."""
        if self._follows_trainer and not self._is_counted:
            self._observer.step = trainer.global_step
        if self._accumulate is not None:
            return self._is_over
        return trainer.accumulate_grad_batches == 1 or not is_accumulating(trainer)

    def count(self, *, moved: bool) -> None:
        """Count an update.

        Args:
            moved: whether it moves the parameters.
        """
        self._is_over = True
        observer = self._observer
        if not self._is_counted or observer.game is not None:
            observer.previous, observer.step = observer.step if moved else observer.previous, observer.step + 1
        self._is_counted = True
