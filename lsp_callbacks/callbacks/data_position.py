"""Where a run is in its data and in its random numbers, so that it can be brought there again."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lsp_callbacks.autograd._torch_internals import tree_leaves
from lsp_callbacks.callbacks._lightning_internals import skip_batches
from lsp_callbacks.callbacks.stable_states import RollBack


class DataPosition:
    """The order of the batches of an epoch follows from the random states at its beginning: these are kept.

    To come to a batch again, they are put back before the loader is iterated, the batches before it are fetched and let
    go, and the random states of the moment are put back. Loaders with ``state_dict`` and ``load_state_dict`` are left
    to Lightning, which restores them by itself. A checksum of the last batch shows whether it was the same one.

    Attributes:
        left_out: batches of this epoch that were fetched and not trained with, beside those of Lightning's count.
    """

    def __init__(self) -> None:
        self._epoch_began: dict[str, Any] = {}
        self._is_iterated = False
        self.left_out = 0

    def index(self, trainer: Any) -> int:
        """Return the index of the next batch in the order of the epoch, at the end of a batch."""
        return trainer.fit_loop.batch_idx + 1 + self.left_out

    def leave_out(self, trainer: Any, roll_backs: Sequence[RollBack], index: int) -> None:
        """Leave out the batches from an index of the epoch on, if training became unstable at them."""
        for roll_back in roll_backs:
            epoch, first, last = roll_back.skipped or (-1, 0, 0)
            if trainer.current_epoch == epoch and first <= index < last:
                skip_batches(trainer, last - index)
                self.left_out += last - index
                index = last

    def begin_fit(self) -> None:
        """Note, before the loaders are made, what the order of the first epoch will follow from."""
        self._epoch_began, self._is_iterated, self.left_out = random_numbers(), True, 0

    def begin_epoch(self) -> None:
        """Note the same of a later epoch; Lightning has made the iterator of the first before."""
        if not self._is_iterated:
            self._epoch_began = random_numbers()
        self._is_iterated, self.left_out = False, 0

    def state(self, trainer: Any, batch: Any, *, is_between: bool = False) -> dict[str, Any]:
        """Return where all processes are; collective.

        Args:
            trainer: Lightning's.
            batch: that came last; None at the beginning of the run.
            is_between: whether it was the last one of its epoch.
        """
        here: dict[str, Any] = {"rng": random_numbers(), "epoch": None if is_between else self._epoch_began}
        here |= {"checksum": checksum(batch), "left_out": self.left_out}
        here["batches"] = 0 if batch is None else trainer.fit_loop.batch_idx + 1
        if trainer.world_size == 1:
            return {"ranks": [here]}
        ranks: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(ranks, here)
        return {"ranks": ranks}

    def return_before_loaders(self, trainer: Any, state: Mapping[str, Any]) -> None:
        """Put the random states back from which the order of the batches follows, before the loaders are made."""
        here = self._of_rank(trainer, state)
        if here is not None:
            set_random_numbers(here["rng"] if here["epoch"] is None else here["epoch"])
            self.begin_fit()

    def return_to_batch(self, trainer: Any, state: Mapping[str, Any]) -> int:
        """Fetch the batches that the state has had, and put its random states back, when training begins.

        Returns:
            The index of the batch that comes next, in the order of the epoch.
        """
        here = self._of_rank(trainer, state)
        if here is None:
            return 0
        # Lightning calls the hook of an epoch's beginning only where a run begins with one.
        self._is_iterated = here["batches"] == 0
        if here["epoch"] is None:
            return 0
        self.left_out = here["left_out"]
        loaders = tree_leaves(trainer.train_dataloader)
        if not all(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders):
            for loader in loaders:
                for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                    set_epoch = getattr(getattr(sampler, "sampler", sampler), "set_epoch", None)
                    if set_epoch is not None:
                        set_epoch(trainer.current_epoch)
            counted = here["batches"]
            last = skip_batches(trainer, counted + self.left_out, counted=counted)
            if checksum(last) != here["checksum"]:
                rank_zero_warn(
                    "RollBackOnInstability: the training loader does not give the batches of this epoch in the same "
                    "order again: the run goes on with others; give it state_dict and load_state_dict, or let its "
                    "order follow from torch's global seed"
                )
        set_random_numbers(here["rng"])
        return here["batches"] + self.left_out

    def _of_rank(self, trainer: Any, state: Mapping[str, Any]) -> dict[str, Any] | None:
        ranks = state["ranks"]
        if len(ranks) == trainer.world_size:
            return ranks[trainer.global_rank]
        rank_zero_warn(
            f"RollBackOnInstability: {len(ranks)} processes have written the state, and there are {trainer.world_size}:"
            " random numbers and the position in the data are not restored"
        )
        return None


def checksum(batch: Any) -> int:
    """Return a checksum of the tensors of a batch."""
    code = 0
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            code = zlib.crc32(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), code)
    return code


def random_numbers() -> dict[str, Any]:
    """Return the global random states as tensors and numbers, for a checkpoint."""
    name, keys, *position = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, np.int64)), *position],
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_numbers(states: Mapping[str, Any]) -> None:
    """Put back what `random_numbers` returned."""
    torch.set_rng_state(states["torch"])
    name, keys, *position = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
