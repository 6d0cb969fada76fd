"""Batch normalisation with the statistics of the batch, held fixed while its samples are differentiated one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import BatchNorm
from lsp_callbacks.step.module_modes import is_handwritten


def can_be_held(module: nn.Module) -> bool:
    """Return whether all normalisations over the batch are torch's, and none is written by hand."""
    return not any(map(is_handwritten, module.modules()))


@contextlib.contextmanager
def held_statistics(module: nn.Module) -> Iterator[set[nn.Module]]:
    """Let normalisations over the batch take its statistics as constants: each output then has a graph of its own.

    The values stay what they are in training. Yields the normalisations that were called so, as they are called.
    """
    held: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for m in module.modules():
            if isinstance(m, BatchNorm):
                hold = _Hold(held)
                stack.callback(m.register_forward_pre_hook(hold.before).remove)
                stack.callback(m.register_forward_hook(hold.after, always_call=True).remove)
        yield held


class _Hold:
    def __init__(self, held: set[nn.Module]) -> None:
        self._held = held
        self._saved: tuple[Any, ...] | None = None

    def before(self, m: Any, args: tuple[Tensor, ...]) -> None:
        if m.training or m.running_mean is None:
            x = args[0].detach()
            self._held.add(m)
            self._saved = m.training, m.running_mean, m.running_var
            m.training, m.running_mean, m.running_var = False, *_moments(x)[1:]

    def after(self, m: Any, args: tuple, output: Any) -> None:
        if self._saved is not None:
            (m.training, m.running_mean, m.running_var), self._saved = self._saved, None


def normalised(layer: Any, x: Tensor) -> Tensor:
    """Return the input of a normalisation over the batch, normalised by its own statistics."""
    centred, _, variance = _moments(x)
    return centred.mul_((variance + layer.eps).rsqrt().view(-1, *[1] * (x.ndim - 2)))


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a tensor less its mean over the batch, that mean, and the variance of each channel.

    On the CPU this takes a tenth of the time of `Tensor.var`, whose reduction over several axes is not vectorised.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean = x.mean(axes)
    centred = x - mean.view(-1, *[1] * (x.ndim - 2))
    return centred, mean, centred.square().mean(axes)
