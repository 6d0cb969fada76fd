"""Lipschitz constants of single layers from above, and of networks from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks import linalg
from lsp_callbacks.autograd._torch_internals import BatchNorm, Dropout
from lsp_callbacks.functional.curvature.condition import SMALL
from lsp_callbacks.functional.network.activations import activation_lipschitz
from lsp_callbacks.functional.network.layer_operators import Shape, weight_operators
from lsp_callbacks.linalg import LinearOperator, norm, operator_norm, unit

#: Probability with which the norm of a large layer may exceed what is taken for its bound.
FAILURE = 1e-3


def lipschitz_lower(jacobian: LinearOperator, *, steps: int = 8) -> Tensor:
    """Return ``max_i ||dX_L / dX_0||_2`` over the samples: no Lipschitz constant can be smaller.

    Args:
        jacobian: ``dX_L / dX_0`` of the network at some samples, one matrix for each.
        steps: pairs of products; each norm is itself a lower bound until it has converged.

    Cost: ``2 steps + 2`` backward passes on the samples.
    """
    u = unit(jacobian @ operator_norm(jacobian, steps=steps, tol=1e-3).vector)
    # By backward passes alone: forward products are wrong behind functions that cannot be differentiated twice.
    return norm(jacobian.T @ u, -1).amax()


def certified_norm(operator: LinearOperator, *, steps: int = 30, failure: float = FAILURE) -> float:
    """Return ``||A||_2`` from above: exact for small operators, otherwise true with probability ``1 - failure``."""
    m, n = operator.shape
    if min(m, n) <= SMALL:
        matrix = (operator.T.dense() if m < n else operator.dense()).double()
        return float(torch.linalg.eigvalsh(matrix.T @ matrix)[-1].clamp_min(0).sqrt())
    return float(linalg.norm_upper(operator, steps=steps, failure=failure))


def layer_lipschitz(module: nn.Module, input_shape: Shape = None, output_shape: Shape = None) -> float | None:
    """Return an upper bound of the Lipschitz constant of one module in eval mode; None where none is known.

    Args:
        module: in eval mode.
        input_shape: of its input, which convolutions need.
        output_shape: of a transposed convolution, where it was called with ``output_size``.
    """
    if (slope := activation_lipschitz(module)) is not None:
        return slope
    parts = (
        {}
        if isinstance(module, nn.Embedding | nn.MultiheadAttention)
        else weight_operators(module, input_shape, output_shape)
    )
    if set(parts) == {""}:
        return certified_norm(parts[""])
    return next((rule(module) for kinds, rule in _RULES if isinstance(module, kinds)), None)


def _gain(module: Any) -> Tensor:
    return torch.ones(()) if module.weight is None else module.weight.detach().abs()


def _running(module: Any) -> float | None:
    if module.running_var is None:
        return None
    return float((_gain(module) / (module.running_var + module.eps).sqrt()).max())


def _normalised(module: Any) -> float:
    eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    return float(_gain(module).max()) / math.sqrt(eps)


def _pooled(module: Any, dilation: Any = None) -> float | None:
    """Return the constant of a pooling by the maximum, which has a dilation, or by the mean."""
    dims = int(type(module).__name__[-2])
    size, stride = _tuple(module.kernel_size, dims), _tuple(module.stride, dims)
    if getattr(module, "divisor_override", None) is not None or any(gap != 1 for gap in _tuple(dilation or 1, dims)):
        return None
    if dilation is None and (module.ceil_mode or (any(_tuple(module.padding, dims)) and not module.count_include_pad)):
        return None  # a window that is cut is divided by less
    return overlap(size, stride) / (math.sqrt(math.prod(size)) if dilation is None else 1.0)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def overlap(size: Sequence[int], stride: Sequence[int]) -> float:
    """Return the square root of the number of pooling windows that hold one cell."""
    return math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(size, stride)))


_RULES: tuple[tuple[Any, Callable[[Any], float | None]], ...] = (
    (Dropout, lambda module: 1.0),
    ((nn.Flatten, nn.Unflatten, nn.ZeroPad2d), lambda module: 1.0),
    (BatchNorm, _running),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _normalised),
    ((nn.Softmax, nn.Softmax2d), lambda module: 0.5),  # diag(p) - p p^T
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), lambda module: _pooled(module, module.dilation)),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), lambda module: _pooled(module)),
)
