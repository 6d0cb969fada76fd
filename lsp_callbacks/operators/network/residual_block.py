"""The Jacobian of a residual block at the input that it received."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lsp_callbacks.autograd.graph import read
from lsp_callbacks.linalg import LinearOperator, identity_like
from lsp_callbacks.operators.curvature.hessian import double_backward
from lsp_callbacks.operators.sgd.sample_rows import agrees, jacobian
from lsp_callbacks.step.snapshot import Call, Unmeasurable, evaluating

# Backward nodes through which an identity path may run: additions, and what is applied to their sum.
_SKIP_NODES = re.compile(
    r"(Add|Relu|LeakyRelu|Elu|Gelu|Silu|Hardtanh|Hardswish|Tanh|Softplus|Clone|Alias|ToCopy|Contiguous"
    r"|View|UnsafeView|Reshape(Alias)?|Transpose|Permute|T|NativeLayerNorm|FusedRmsNorm|NativeGroupNorm"
    r"|(Native|Cudnn|Mkldnn|Miopen)BatchNorm|NativeDropout|AsStrided)Backward\d*"
)


@dataclass(frozen=True)
class Block:
    """A residual block ``F`` at its captured input, and the Jacobian of ``hg = F - id`` there, per sample.

    Attributes:
        jacobian: ``hG``, a batch of ``(d, d)`` operators, one for each sample.
        skip: whether the input reaches the output by additions alone (up to a final activation or norm).
        samples: how many samples were taken.
        custom: autograd functions of the user's own in the block, see `Graph`.
    """

    jacobian: LinearOperator
    skip: bool
    samples: int
    custom: tuple[str, ...] = ()

    def check(self, name: str) -> None:
        """Forward products differentiate a backward pass: with functions of the user's own they may be wrong.

        Raises:
            Unmeasurable: if ``<w, J v>`` is not ``<J^T w, v>``.
        """
        if self.custom and not agrees(self.jacobian, 1e-3):
            raise Unmeasurable(
                f"the backward of {' and '.join(self.custom)} in block {name!r} cannot be differentiated "
                "(once_differentiable, or detached tensors): write it in operations that can, or leave residual_cfl out"
            )


def residual_block(module: nn.Module, call: Call, *, samples: int) -> Block:
    """Linearises a shape-preserving block ``F = id + hg`` at what it was called with.

    The block runs in eval mode (BatchNorm by its running statistics, no dropout), so that samples do not mix and
    the Jacobian is block-diagonal over them; forward and adjoint products are taken by differentiating one graph
    once and twice.

    Args:
        module: the block.
        call: its captured call; the first floating-point tensor is its input.
        samples: how many samples of the batch to keep, at least.

    Returns:
        The block with its Jacobian.

    Raises:
        Unmeasurable: if input and output differ in shape, or the block was not called.

    Cost: one forward and backward pass of the block on ``samples`` samples; a product costs one backward pass.
    """
    axis = _sample_axis(module)
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    leaves: list[Tensor] = []
    size = (call.input_shape or (0,) * (axis + 1))[axis] if call.input_shape else 0
    # Of a mask that is as long as the batch is large, there is no telling which axis to cut: keep all samples.
    tensors = [v for v in tree_leaves((call.args, call.kwargs)) if isinstance(v, Tensor)]
    taken = size if any(tuple(v.shape) == (size, size) for v in tensors[1:]) else min(samples, size)

    def sample(value: Any) -> Any:
        if _is_cache(value):  # it holds this very call already
            return None
        if not isinstance(value, Tensor):
            return value
        along = axis if value.ndim > axis and value.shape[axis] == size else 0
        if value.ndim and value.shape[along] == size:
            value = value.narrow(along, 0, taken)
        if value.is_floating_point() and own is not None:  # autocast had rounded it, and is off here
            value = value.to(own)
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
            raise Unmeasurable(f"its output {tuple(y.shape) if y is not None else None} has not the shape of its "
                               f"input {tuple(x.shape)}: a residual block keeps the shape")  # fmt: skip
        if not y.requires_grad:
            raise Unmeasurable("it cannot be differentiated: its forward runs without gradients")
        whole = jacobian(y, x, axes=(axis, axis))
    return Block(whole + -1.0 * identity_like(whole), has_skip_path(y, x), taken, read(y).custom)


def has_skip_path(output: Tensor, leaf: Tensor) -> bool:
    """Whether ``leaf`` reaches ``output`` through at least one addition and otherwise only through what is
    applied to the sum (an activation, a norm, a change of layout), by walking the autograd graph.
    """
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(output.grad_fn, False)]
    while stack:
        node, added = stack.pop()
        if node is None or (node, added) in seen:
            continue
        seen.add((node, added))
        if getattr(node, "variable", None) is leaf:
            if added:
                return True
            continue
        name = node.name()
        if _SKIP_NODES.fullmatch(name):
            inputs = node.next_functions if name.startswith("Add") else node.next_functions[:1]
            stack.extend((child, added or name.startswith("Add")) for child, _ in inputs)
    return False


def _is_cache(value: Any) -> bool:
    """Whether it is a key/value cache of transformers."""
    return hasattr(value, "get_seq_length")


def _sample_axis(module: nn.Module) -> int:
    """0, but for PyTorch's transformer layers with ``batch_first=False``."""
    attention = getattr(module, "self_attn", None)
    return 1 if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first else 0
