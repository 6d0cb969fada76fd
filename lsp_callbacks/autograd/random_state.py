"""The global random states, kept and put back."""

from __future__ import annotations

import random

import numpy as np
import torch


class TorchRandomState:
    """The global random states of torch (CPU and the devices in use): a copy takes a microsecond on the CPU."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


class RandomState(TorchRandomState):
    """The global random states of torch, numpy and Python."""

    def __init__(self) -> None:
        super().__init__()
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def restore(self) -> None:
        """Put them back."""
        super().restore()
        np.random.set_state(self.numpy)
        random.setstate(self.python)
