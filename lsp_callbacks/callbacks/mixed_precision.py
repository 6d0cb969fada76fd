"""The gradient scaler of Lightning's mixed precision."""

from __future__ import annotations

from typing import Any

import torch


def loss_scale(trainer: Any) -> float:
    """Return the factor of mixed precision on the loss, and on its gradient in the backward pass."""
    scaler = _scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def is_scaled(trainer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the gradients are still multiplied by that factor: fused optimizers divide it out."""
    return _scaler(trainer) is not None and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_overflowed(trainer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the scaler will leave this step out, as its gradients have overflowed."""
    scaler = _scaler(trainer)
    if scaler is None:
        return False
    overflows = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(overflow) for overflow in overflows.values())


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
