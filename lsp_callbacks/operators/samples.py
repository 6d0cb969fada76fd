"""A tensor of several samples as one row for each, and the Jacobian between two such tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.unmeasurable import Unmeasurable


@dataclass(frozen=True)
class Rows:
    """One row a sample, whatever the position of the sample axis; at least in float32.

    Args:
        like: a tensor of the shape and type that `back` returns.
        axis: of the samples.
    """

    like: Tensor
    axis: int = 0

    @property
    def samples(self) -> int:
        return self.like.shape[self.axis]

    @property
    def length(self) -> int:
        """Numbers a sample."""
        return self.like.numel() // max(1, self.samples)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.like.dtype, torch.float32)

    def flat(self, tensor: Tensor) -> Tensor:
        """``(samples, length)``."""
        return tensor.movedim(self.axis, 0).reshape(self.samples, -1).to(self.dtype)

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of `flat`."""
        shape = self.like.movedim(self.axis, 0).shape
        return rows.reshape(shape).movedim(0, self.axis).to(self.like.dtype)


def jacobian(outputs: Tensor, inputs: Tensor, *, axes: tuple[int, int] = (0, 0)) -> LinearOperator:
    """``d outputs / d inputs`` for each sample, from a graph in which samples do not mix.

    Adjoint products differentiate the graph once. Forward products differentiate the adjoint ``u -> J^T u``, which is
    linear in u, with respect to u.

    Args:
        outputs: with a graph that holds ``inputs``.
        inputs: a leaf, or a tensor within the graph.
        axes: of the samples, in outputs and inputs.

    Returns:
        ``(m, n)`` with one matrix for each sample; 0 where the outputs do not depend on the inputs.

    Cost: one backward pass each product, and one when it is made.
    """
    out, into = Rows(outputs, axes[0]), Rows(inputs, axes[1])
    with torch.enable_grad():
        u = torch.zeros_like(outputs, requires_grad=True)
        (pullback,) = torch.autograd.grad(outputs, inputs, u, create_graph=True, materialize_grads=True)

    def forward(v: Tensor) -> Tensor:
        if not pullback.requires_grad:  # outputs do not depend on inputs
            return v.new_zeros(out.samples, out.length)
        (jvp,) = torch.autograd.grad(pullback, u, into.back(v), retain_graph=True, materialize_grads=True)
        return out.flat(jvp)

    def adjoint(w: Tensor) -> Tensor:
        (vjp,) = torch.autograd.grad(outputs, inputs, out.back(w), retain_graph=True, materialize_grads=True)
        return into.flat(vjp)

    return LinearOperator(
        (out.length, into.length), forward, adjoint, batch=(into.samples,), dtype=into.dtype, device=inputs.device
    )


def check_adjoint(forward: Tensor, adjoint: Tensor) -> None:
    """``w . J v = v . v`` for ``v = J^T w``: a backward that cannot be differentiated loses J v without a word.

    Args:
        forward: the left side.
        adjoint: the right side.

    Raises:
        Unmeasurable: where they differ by more than half precision does.
    """
    if bool((forward - adjoint).abs() > 0.1 * adjoint):
        raise Unmeasurable(
            "forward products with the network's Jacobian contradict its gradients: the backward of some custom "
            "autograd.Function cannot be differentiated (once_differentiable); write it in operations that can"
        )
