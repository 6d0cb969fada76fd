"""Slopes of activation functions: how steep they can be, how steep they are, and where they are flat."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: An activation is flat where its slope is below this share of its largest one.
FLAT = 0.05

GELU_TANH = 1.1289930686587717  # near 1.4185; that of the exact GELU is 9e-5 below
SILU = 1.0998393201288670  # x sigmoid(x), near 2.3994
MISH = 1.0884981612517280  # near 1.4906
_GELU = 0.5 * math.erfc(-1.0) + math.exp(-1.0) / math.sqrt(math.pi)  # at sqrt(2)
_SELU = 1.7580993408473766  # alpha times scale, at 0 from below

#: ``sup |phi'|`` by class name, for the modules of PyTorch and transformers; None where phi jumps.
LIPSCHITZ: dict[str, Callable[[Any], float | None]] = {
    **dict.fromkeys(
        ("CELU", "Hardtanh", "Identity", "LogSigmoid", "ReLU", "ReLU6", "Softplus", "Softshrink", "Softsign", "Tanh",
         "Tanhshrink"),
        lambda module: 1.0,
    ),
    "ELU": lambda module: max(1.0, abs(module.alpha)),
    "GELU": lambda module: _GELU if module.approximate == "none" else GELU_TANH,
    "Hardshrink": lambda module: 1.0 if module.lambd == 0 else None,
    "Hardsigmoid": lambda module: 1 / 6,
    "Hardswish": lambda module: 1.5,
    "LeakyReLU": lambda module: max(1.0, abs(module.negative_slope)),
    "Mish": lambda module: MISH,
    "PReLU": lambda module: max(1.0, float(module.weight.detach().abs().max())),
    "RReLU": lambda module: max(1.0, abs(module.lower), abs(module.upper)),
    "SELU": lambda module: _SELU,
    "SiLU": lambda module: SILU,
    "Sigmoid": lambda module: 0.25,
    "Threshold": lambda module: 1.0 if module.threshold == module.value else None,
    # transformers
    "FastGELUActivation": lambda module: GELU_TANH,
    "GELUActivation": lambda module: _GELU,
    "GELUTanh": lambda module: GELU_TANH,
    "NewGELUActivation": lambda module: GELU_TANH,
    "QuickGELUActivation": lambda module: SILU,  # silu(1.702 x) / 1.702
    "SiLUActivation": lambda module: SILU,
}  # fmt: skip


def activation_lipschitz(module: nn.Module) -> float | None:
    """Return ``sup |phi'|`` of an elementwise activation, its Lipschitz constant in every p-norm.

    Args:
        module: of PyTorch or transformers; of another class of the same name nothing is assumed.

    Returns:
        None for anything else, and for functions that jump (Hardshrink, most Thresholds).

    Example:
        >>> from torch import nn
        >>> from lsp_callbacks.functional import activation_lipschitz
        >>> activation_lipschitz(nn.Sigmoid()), round(activation_lipschitz(nn.GELU()), 4)
        (0.25, 1.1289)
    """
    kind = type(module)
    if kind.__module__.split(".")[0] not in ("torch", "transformers"):
        return None
    constant = LIPSCHITZ.get(kind.__name__)
    return None if constant is None else constant(module)


def activation_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``phi'(x)``, elementwise, as autograd defines it at kinks (0 for ReLU at 0).

    Args:
        function: elementwise; a module or a function. It may work in place.
        x: of any shape.

    Returns:
        Slopes of the shape of ``x``, without a graph.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf.clone())
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return slope


def flat(slope: Tensor, lipschitz: float = 1.0) -> Tensor:
    """Return where ``|slope| < FLAT * lipschitz``: so little of the gradient passes that the unit hardly learns.

    For tanh this is ``|x| > 2.18``, for the sigmoid ``|x| > 4.36``, for ReLU the negative half.
    """
    return slope.abs() < FLAT * lipschitz
