"""The global random states, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch


class TorchRandomState:
    """The global random states of torch (CPU and the devices in use): a copy takes a microsecond on the CPU.

    Attributes:
        setters: each puts one of them back when it is called.
    """

    def __init__(self) -> None:
        self.setters: list[Callable[[], None]] = [partial(torch.set_rng_state, torch.get_rng_state())]
        if torch.cuda.is_initialized():
            self.setters.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        if torch.backends.mps.is_available():
            self.setters.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def restore(self) -> None:
        """Put them back."""
        for put_back in self.setters:
            put_back()


class RandomState(TorchRandomState):
    """The global random states of torch, numpy and Python."""

    def __init__(self) -> None:
        super().__init__()
        self.setters.append(partial(np.random.set_state, np.random.get_state()))
        self.setters.append(partial(random.setstate, random.getstate()))


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
