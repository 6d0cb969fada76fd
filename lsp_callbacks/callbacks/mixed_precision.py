"""The gradient scaler of Lightning's mixed precision."""

from __future__ import annotations

from typing import Any

import torch

from lsp_callbacks.autograd._torch_internals import overflowed, unscales_gradients


def loss_scale(trainer: Any) -> float:
    """Return the factor of mixed precision on the loss, and on its gradient in the backward pass."""
    scaler = _scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def is_scaled(trainer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the gradients are still multiplied by that factor: fused optimizers divide it out."""
    return _scaler(trainer) is not None and unscales_gradients(optimizer)


def is_overflowed(trainer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the scaler will leave this step out, as its gradients have overflowed."""
    scaler = _scaler(trainer)
    return scaler is not None and overflowed(scaler, optimizer)


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
