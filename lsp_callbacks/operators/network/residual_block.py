"""The Jacobian of a residual block at the input that it received."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import tree_leaves, tree_map
from lsp_callbacks.autograd.double_backward import agrees, double_backward, jacobian, once_differentiable
from lsp_callbacks.autograd.graph import Graph, inputs_of, leaf_of, read, walk
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, identity_like
from lsp_callbacks.linalg.operator import Product
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.replay_checks import Call

# Backward nodes through which an identity path may run: additions, and functions applied to their sum.
_SKIP_NODES = re.compile(
    r"(Add|Relu|LeakyRelu|Elu|Gelu|Silu|Hardtanh|Hardswish|Tanh|Softplus|Clone|Alias|ToCopy|Contiguous"
    r"|View|UnsafeView|Reshape(Alias)?|Transpose|Permute|T|NativeLayerNorm|FusedRmsNorm|NativeGroupNorm"
    r"|(Native|Cudnn|Mkldnn|Miopen)BatchNorm|NativeDropout|AsStrided)Backward\d*"
)


@dataclass(frozen=True)
class Block:
    """A residual block ``F`` at its captured input, and the Jacobian of ``hg = F - id`` there, per sample.

    Attributes:
        jacobian: ``hG``, a batch of ``(d, d)`` operators, one for each sample; with two copies ``(2, samples)`` of
            them, the same matrices twice.
        skip: whether the input reaches the output by additions alone (up to a final activation or norm).
        samples: how many samples were used.
        graph: properties of the block's autograd graph.
    """

    jacobian: LinearOperator
    skip: bool
    samples: int
    graph: Graph

    def check(self, name: str) -> None:
        """Raise an error if forward products are wrong, as custom functions of the user can make them.

        Args:
            name: of the block, for the message.

        Raises:
            Unmeasurable: if ``<w, J v>`` is not ``<J^T w, v>``.
        """
        if self.graph.custom and not agrees(self.jacobian, 1e-3):
            raise once_differentiable(self.graph, f"block {name!r}", "leave residual_cfl out")


def residual_block(module: nn.Module, call: Call, *, samples: int, twice: bool = False) -> Block:
    """Linearise a shape-preserving block ``F = id + hg`` at the arguments of a call.

    The block runs in eval mode (BatchNorm by its running statistics, no dropout), so that samples do not mix and
    the Jacobian is block-diagonal over them.

    Args:
        module: the block.
        call: its captured call; the first floating-point tensor is its input.
        samples: how many samples of the batch to use, or more where its arguments cannot be cut.
        twice: run each sample twice, so that one product serves two iterations; not where arguments cannot be cut.

    Returns:
        The block with its Jacobian.

    Raises:
        Unmeasurable: input and output that differ in shape, a block without a floating-point input or without a graph.

    Cost: one forward and backward pass of the block on ``samples`` samples; a product costs one backward pass.
    """
    axis = _sample_axis(module)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    leaves: list[Tensor] = []
    size = (call.input_shape or (0,) * (axis + 1))[axis] if call.input_shape else 0
    # If a mask is as long as the batch is large, the axis to cut is ambiguous: keep all samples.
    tensors = [v for v in tree_leaves((call.args, call.kwargs)) if isinstance(v, Tensor)]
    ambiguous = any(tuple(v.shape) == (size, size) for v in tensors[1:])
    taken, copies = (size, 1) if ambiguous else (min(samples, size), 1 + twice)

    def sample(value: Any) -> Any:
        if _is_cache(value):  # it holds this very call already
            return None
        if not isinstance(value, Tensor):
            return value
        along = axis if value.ndim > axis and value.shape[axis] == size else 0
        if value.ndim and value.shape[along] == size:
            value = torch.cat([value.narrow(along, 0, taken)] * copies, along)
        if value.is_floating_point() and dtype is not None:  # autocast had rounded it, and is off here
            value = value.to(dtype)
        if value.is_floating_point() and not leaves:
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[0].clone()  # the block may work in place on its input
        return value

    with torch.enable_grad():
        args, kwargs = tree_map(sample, (call.args, call.kwargs), is_leaf=_is_cache)
    if not leaves:
        raise Unmeasurable("the block received no floating-point tensor")
    x = leaves[0]
    with evaluating(module), double_backward(module):
        output = module(*args, **kwargs)
        y = output if isinstance(output, Tensor) else next((o for o in output if isinstance(o, Tensor)), None)
        if y is None or y.shape != x.shape:
            shape = None if y is None else tuple(y.shape)
            raise Unmeasurable(
                f"its output has shape {shape} and its input {tuple(x.shape)}: a residual block keeps the shape"
            )
        if not y.requires_grad:
            raise Unmeasurable("it cannot be differentiated: its forward runs without gradients")
        whole = jacobian(y, x, axes=(axis, axis))
    branch = whole + -1.0 * identity_like(whole)
    if copies == 2:
        branch = _paired(branch, taken)
    return Block(branch, has_skip_path(y, x), taken, read(y))


def _paired(operator: LinearOperator, samples: int) -> LinearOperator:
    """Return the operator of a batch that holds each sample twice with the batch axes ``(2, samples)``."""

    def over(product: Product) -> Product:
        return lambda v: product(v.reshape(2 * samples, -1)).view(2, samples, -1)

    assert operator.adjoint is not None
    return replace(operator, apply=over(operator.apply), adjoint=over(operator.adjoint), batch=(2, samples))


def has_skip_path(output: Tensor, leaf: Tensor) -> bool:
    """Return whether a leaf reaches an output through additions, and otherwise only through functions of their sum.

    At least one addition is needed. An activation, a norm or a change of layout may be applied to the sum.
    """
    paths: dict[Any, set[bool]] = {None: set()}  # of each node the paths from the leaf: with an addition or without
    for node in walk([output.grad_fn]):
        name, inputs = node.name(), inputs_of(node)
        if leaf_of(node) is leaf:
            paths[node] = {False}
        elif not _SKIP_NODES.fullmatch(name):
            paths[node] = set()
        elif name.startswith("Add"):
            paths[node] = {True for child in inputs if paths[child]}
        else:
            paths[node] = paths[inputs[0]] if inputs else set()
    return True in paths[output.grad_fn]


def _is_cache(value: Any) -> bool:
    """Return whether a value is a key/value cache of transformers."""
    return hasattr(value, "get_seq_length")


def _sample_axis(module: nn.Module) -> int:
    """Return the axis of the samples: 0, or 1 for PyTorch's transformer layers with ``batch_first=False``."""
    attention = getattr(module, "self_attn", None)
    return 1 if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first else 0
