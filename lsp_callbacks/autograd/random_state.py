"""The global random states, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

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
