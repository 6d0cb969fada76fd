"""Train and eval mode of a module during a measurement, and the normalisations that depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lsp_callbacks.autograd._torch_internals import BatchNorm, InstanceNorm, buffers


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep the module in eval mode (running statistics, no dropout), with gradients enabled; put its modes back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def is_handwritten(m: nn.Module) -> bool:
    """Return whether a module that is none of torch's normalises over the batch: it has buffers of running moments."""
    if isinstance(m, BatchNorm | InstanceNorm) or not hasattr(m, "running_mean"):
        return False
    return {"running_mean", "running_var"} <= {*buffers(m).keys()}  # by keys(): those of a scripted module are no dict


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return the normalisations that make samples depend on each other, by the statistics of their batch.

    These are torch's and their subclasses, unless frozen (in eval mode, with running statistics, while the rest is
    trained), and custom ones that keep running statistics under torch's names.
    """

    def ties(m: nn.Module) -> bool:
        if isinstance(m, BatchNorm):
            return m.training or m.running_mean is None
        return m.training and is_handwritten(m)

    return [m for m in module.modules() if ties(m)]


@contextlib.contextmanager
def as_trained(module: nn.Module, *, together: bool) -> Iterator[None]:
    """Keep the module in eval mode with gradients enabled, except for normalisations that train in training mode.

    These update their running statistics: pass a copy of the module.

    Args:
        module: as a step begins with it.
        together: whether normalisations over the batch are excepted, too, see `batch_norms`; otherwise only those of
            each sample alone.
    """
    alone = (m for m in module.modules() if isinstance(m, InstanceNorm))
    modes = [(m, m.training) for m in (*alone, *(batch_norms(module) if together else ()))]
    with evaluating(module):
        for m, training in modes:
            m.training = training
        yield
