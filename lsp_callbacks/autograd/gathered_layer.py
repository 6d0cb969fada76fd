"""The weights of one layer as a whole, where each process holds a shard of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lsp_callbacks.autograd._torch_internals import PARAMETERS
from lsp_callbacks.autograd.spread_tensors import is_spread, whole


@contextlib.contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Let a layer hold its whole parameters, which all processes gather together, and at the end its shards again.

    Args:
        layer: with its children; nothing happens where no parameter of theirs is spread over processes.

    Memory: the parameters of the layer. Cost: they are sent to all processes.
    """
    with contextlib.ExitStack() as stack:
        for child in layer.modules():
            held = vars(child)[PARAMETERS]
            for name, p in list(held.items()):
                if is_spread(p):
                    stack.callback(held.__setitem__, name, p)
                    held[name] = nn.Parameter(whole(p), requires_grad=p.requires_grad)
        yield
