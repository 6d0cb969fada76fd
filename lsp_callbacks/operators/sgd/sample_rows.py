"""A tensor of several samples as one row for each, and the Jacobian between two such tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.autograd.graph import read
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.step.snapshot import Unmeasurable


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


def check_adjoint(operator: LinearOperator, loss: Tensor, what: str) -> None:
    """Refuses forward products that may be wrong without a word.

    They differentiate a backward pass, which a ``torch.autograd.Function`` of the user's own need not allow
    (``once_differentiable``, or detached tensors).

    Args:
        operator: with an adjoint.
        loss: whose graph holds the functions.
        what: is measured, for the message.

    Raises:
        Unmeasurable: if there is such a function and ``<w, A v>`` is not ``<A^T w, v>`` for random v and w.

    Cost: two products where there is such a function.
    """
    graph = read(loss)
    if graph.custom and not agrees(operator, 1e-3 if graph.full else 5e-2):
        raise Unmeasurable(
            f"the backward of {' and '.join(graph.custom)} in {what} cannot be differentiated (once_differentiable, or "
            "detached tensors): write it in operations that can, or leave this quantity out"
        )


def agrees(operator: LinearOperator, tolerance: float) -> bool:
    """Whether ``<w, A v>`` is ``<A^T w, v>`` for random v and w; False where a product cannot be had."""
    generator = torch.Generator().manual_seed(0)
    m, n = operator.shape
    v, w = (torch.randn(*operator.batch, k, generator=generator, dtype=operator.dtype) for k in (n, m))
    v, w = v.to(operator.device), w.to(operator.device)
    try:
        there, back = operator @ v, operator.T @ w
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no second derivative is implemented
        return False
    defect = ((w.double() * there).sum(-1) - (back.double() * v).sum(-1)).abs()
    size = norm(w, -1) * norm(there, -1)
    return bool((defect <= tolerance * size).all())
