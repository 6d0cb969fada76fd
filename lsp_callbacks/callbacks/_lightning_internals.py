"""All of Lightning that is read here though it is not public; no other file names a private attribute of Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def logged_row(trainer: Any) -> int:
    """Return the step number at which Lightning itself logs this batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_accumulating(trainer: Any) -> bool:
    """Return True if the optimizer does not step after this batch."""
    return trainer.fit_loop._should_accumulate()


def has_backward(trainer: Any) -> bool:
    """Return False in an epoch that weight averaging adds, in which nothing is differentiated."""
    return not trainer.fit_loop._skip_backward


def skip_batches(trainer: Any, count: int, *, counted: int = 0) -> Any:
    """Fetch the next batches of the epoch and let them go; return the last one, None at the end of the epoch.

    Args:
        trainer: Lightning's.
        count: of the batches.
        counted: how many of them the loop will count as fetched itself, when it goes on from a checkpoint.
    """
    fetcher, batch = trainer.fit_loop._data_fetcher, None
    for _ in range(count):
        try:
            batch, *_ = next(fetcher)
        except StopIteration:
            return None
    fetcher.fetched -= counted
    return batch


def remaining_batches(trainer: Any) -> Iterator[Any]:
    """Yield the other batches of the epoch, on the device, as ``training_step`` would receive them."""
    fetcher = trainer.fit_loop._data_fetcher
    while True:
        try:
            batch, *_ = next(fetcher)  # iter() would begin again, with samples that have been seen
        except StopIteration:
            return
        yield on_device(trainer, batch)


def on_device(trainer: Any, batch: Any) -> Any:
    """Return a batch from a loader as ``training_step`` receives it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def has_communication_hook(trainer: Any) -> bool:
    """Return True if a ``ddp_comm_hook`` replaces the mean of the gradients over the processes."""
    return getattr(trainer.strategy, "_ddp_comm_hook", None) is not None


def is_launched_elsewhere(trainer: Any) -> bool:
    """Return True if the run has processes of its own: ``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``."""
    return is_kind_of("_MultiProcessingLauncher", trainer.strategy.launcher)


def is_kind_of(name: str, thing: Any) -> bool:
    """Return True if a class of this name is among those of ``thing``: both packages of Lightning have one."""
    return any(c.__name__ == name for c in type(thing).__mro__)


def has_no_optimizer(trainer: Any) -> bool:
    """Return True if ``configure_optimizers`` has returned None, for which Lightning puts an optimizer of no use."""
    return bool(trainer.optimizers) and all(is_kind_of("_MockOptimizer", optimizer) for optimizer in trainer.optimizers)


def is_lightning_module(module: nn.Module) -> bool:
    """Return True if the module reads the epoch and the step from a trainer."""
    return hasattr(module, "_trainer")


def replace_trainer(module: nn.Module, trainer: Any) -> None:
    """Give another trainer to the copy of a LightningModule, and take from it what belongs to the original."""
    attributes = vars(module)
    attributes["_trainer"] = trainer
    attributes.pop("_hparams_initial", None)  # never changed, and as large as what it was made from
    for name in attributes.pop("_compiler_ctx", None) or ():
        # Compiled methods are bound to the original.
        attributes.pop(name.removeprefix("original_"), None)
