"""The network's outputs in eval mode, with running statistics or with those of the batch instead."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import BatchNorm
from lsp_callbacks.autograd.module_calls import leaves, record_calls
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.snapshot import Snapshot


def outputs(snapshot: Snapshot, *, batch_statistics: bool = False) -> Tensor:
    """Return the output of the last module with a weight matrix on the step's batch, in eval mode (no dropout).

    Args:
        snapshot: a step; of accumulated batches the first is used.
        batch_statistics: BatchNorm normalises by the statistics of the batch, as in training; running ones do not move.

    Raises:
        Unmeasurable: without such a module.

    Cost: one forward pass.
    """
    norms = [m for m in snapshot.module.modules() if isinstance(m, BatchNorm)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(snapshot.module))
        for norm in norms if batch_statistics else []:
            # Before the hooks that record the output of the layer.
            stack.callback(norm.register_forward_hook(_by_batch).remove)
        root = stack.enter_context(record_calls(snapshot.module))
        stack.enter_context(torch.no_grad())
        if snapshot.sample is None:
            snapshot.replay()
        else:
            snapshot.sample(sys.maxsize)
    sent = [call.sent for call in leaves(root) if call.begins_layer and call.sent is not None]
    if not sent:
        raise Unmeasurable("no module with a weight matrix was called")
    return sent[-1].double()


def _by_batch(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    weight: Any = norm.weight
    bias: Any = norm.bias
    eps: Any = norm.eps
    return F.batch_norm(args[0], None, None, weight, bias, training=True, eps=eps)
