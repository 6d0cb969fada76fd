"""A layer's weight as the operator that the layer applies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import convolve, output_padding, plain_tensors
from lsp_callbacks.functional.network.adapted_layers import as_one_layer, is_one_map
from lsp_callbacks.linalg import LinearOperator, from_matrix, norm

#: Of a tensor; None where it is not needed.
Shape = tuple[int, ...] | None


@singledispatch
def weight_operators(
    layer: nn.Module, input_shape: Shape = None, output_shape: Shape = None
) -> dict[str, LinearOperator]:
    """Return the linear maps that a layer applies, by the name of the part ("" where it has only one).

    Supported are Linear, the projections of attention, Embedding, convolutions and Hugging Face's Conv1D, each of them
    also with LoRA of ``peft`` beside it: the map is then that of ``W + scaling B A``.

    Args:
        layer: in eval mode, so that reading a parametrised weight does not move its buffers.
        input_shape: of a convolution's input, with or without a batch axis.
        output_shape: of a transposed convolution, where it was called with ``output_size``.

    Returns:
        Operators on flat vectors; empty for a module that is not such a layer.
    """
    if type(layer).__name__ == "Conv1D" and getattr(layer, "nf", None) is not None:  # transformers, y = x W
        return {"": from_matrix(_weight(layer).T)}
    if is_one_map(layer):
        return weight_operators(as_one_layer(layer), input_shape, output_shape)
    return {}


@weight_operators.register
def _(layer: nn.Linear, input_shape: Shape = None, output_shape: Shape = None) -> dict[str, LinearOperator]:
    return {"": from_matrix(_weight(layer))}


@weight_operators.register
def _(layer: nn.Embedding, input_shape: Shape = None, output_shape: Shape = None) -> dict[str, LinearOperator]:
    return {"": from_matrix(_weight(layer).T)}


@weight_operators.register
def _(layer: nn.MultiheadAttention, input_shape: Shape = None, output_shape: Shape = None) -> dict[str, LinearOperator]:
    # The output projection is called as a function: its module fires no hooks, so it is read here.
    if layer.in_proj_weight is not None:
        parts = layer.in_proj_weight.detach().chunk(3)
    else:
        parts = tuple(w.detach() for w in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight))
    return {
        **{name: from_matrix(part) for name, part in zip("qkv", parts)},
        "out_proj": from_matrix(_weight(layer.out_proj)),
    }


@weight_operators.register(nn.Conv1d)
@weight_operators.register(nn.Conv2d)
@weight_operators.register(nn.Conv3d)
def _(layer: nn.Conv1d, input_shape: Shape = None, output_shape: Shape = None) -> dict[str, LinearOperator]:
    weight = _weight(layer)
    shape = _unbatched(input_shape, layer)
    return {"": _linear_map(lambda x: convolve(layer, x, weight), shape, weight)}


@weight_operators.register(nn.ConvTranspose1d)
@weight_operators.register(nn.ConvTranspose2d)
@weight_operators.register(nn.ConvTranspose3d)
def _(layer: nn.ConvTranspose1d, input_shape: Shape = None, output_shape: Shape = None) -> dict[str, LinearOperator]:
    weight = _weight(layer)
    dims = len(layer.kernel_size)
    shape = _unbatched(input_shape, layer)
    transposed: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    # forward(output_size=...) may have asked for another padding than the layer's own: take the real size.
    wanted = list(output_shape[-dims:]) if output_shape else None
    like = torch.empty(1, *shape, device="meta")
    extra = output_padding(layer, like, wanted)

    def forward(x: Tensor) -> Tensor:
        return transposed(x, weight, None, layer.stride, layer.padding, extra, layer.groups, layer.dilation)

    return {"": _linear_map(forward, shape, weight)}


def is_embedding(layer: nn.Module) -> bool:
    """Return whether a layer is an embedding, with or without adapters."""
    return isinstance(layer.base_layer if is_one_map(layer) else layer, nn.Embedding)


def row_norm(layer: nn.Module) -> Tensor:
    """Return ``max_i ||W_i||``: the operator norm from one-hot vectors, which is how an embedding is used."""
    return norm(_weight(as_one_layer(layer) if is_one_map(layer) else layer), 1).max()


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if len(plain_tensors(weight)) > 1 and hasattr(weight, "dequantize"):  # torchao's: integers and scales
        weight = weight.dequantize()
    # Half precision would round the iteration's vectors, too.
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _unbatched(shape: Shape, layer: nn.Conv1d | nn.ConvTranspose1d) -> tuple[int, ...]:
    assert shape is not None
    return (layer.in_channels, *shape[-len(layer.kernel_size) :])


def _linear_map(forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], weight: Tensor) -> LinearOperator:
    """Return a linear function of one unbatched input as an operator, with its adjoint from one retained graph."""
    with torch.enable_grad():
        x = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        y = forward(x)

    def apply(v: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(v.reshape(x.shape)).reshape(-1)

    def adjoint(u: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, u.reshape(y.shape), retain_graph=True)[0].reshape(-1)

    return LinearOperator((y.numel(), x.numel()), apply, adjoint, dtype=weight.dtype, device=weight.device)


@contextlib.contextmanager
def in_eval_mode(layer: nn.Module) -> Iterator[None]:
    """Put a layer into eval mode, so that reading a parametrised weight does not move its buffers, and back."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
