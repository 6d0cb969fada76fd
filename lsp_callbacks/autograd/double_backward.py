"""Jacobians by differentiating a backward pass, and the check that backward passes may be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsp_callbacks.autograd.graph import Graph
from lsp_callbacks.autograd.sample_rows import Rows
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, norm


@contextlib.contextmanager
def double_backward(module: nn.Module) -> Iterator[None]:
    """Select kernels that can be differentiated twice: math attention, no compilation, no cuDNN recurrence."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def jacobian(
    outputs: Tensor, inputs: Tensor | Sequence[Tensor], *, axes: tuple[int, int] | None = None
) -> LinearOperator:
    """Return ``J = d outputs / d inputs`` from one graph, by its products.

    Adjoint products differentiate the graph once. Forward products differentiate the adjoint ``u -> J^T u``, which is
    linear in u, with respect to u: they need backward functions that can be differentiated, see `check_adjoint`.

    Args:
        outputs: with a graph that holds ``inputs``.
        inputs: leaves, or tensors within the graph, of any shapes.
        axes: of the samples in outputs and in the input, for a graph in which samples do not mix. None treats all
            numbers of the outputs, and those of all inputs, as one vector each.

    Returns:
        ``(m, n)``; with ``axes`` a batch of one matrix for each sample. Zero where the outputs do not depend on the
        inputs. Vectors are at least float32.

    Raises:
        RuntimeError: outputs without a graph, or (by a product) a function without a second derivative.

    Cost: one backward pass for each product, and one when the operator is made.
    """
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)

    def flat(parts: Sequence[Tensor]) -> Tensor:
        return _vector(parts) if axes is None else Rows(tensors[0], axes[1]).flat(parts[0])

    with torch.enable_grad():
        values = _vector([outputs]) if axes is None else Rows(outputs, axes[0]).flat(outputs)
        cotangent = torch.zeros_like(values, requires_grad=True)
        pullback = flat(torch.autograd.grad(values, tensors, cotangent, create_graph=True, materialize_grads=True))

    def forward(v: Tensor) -> Tensor:
        if not pullback.requires_grad:  # outputs do not depend on inputs, or a backward function detaches
            return torch.zeros_like(values)
        v = v.to(pullback.dtype)
        return torch.autograd.grad(pullback, cotangent, v, retain_graph=True, materialize_grads=True)[0]

    def adjoint(w: Tensor) -> Tensor:
        w = w.to(values.dtype)
        return flat(torch.autograd.grad(values, tensors, w, retain_graph=True, materialize_grads=True))

    return LinearOperator(
        (values.shape[-1], pullback.shape[-1]),
        forward,
        adjoint,
        batch=tuple(pullback.shape[:-1]),
        dtype=pullback.dtype,
        device=pullback.device,
    )


def _vector(parts: Sequence[Tensor]) -> Tensor:
    vector = torch.cat([part.to_dense().reshape(-1) for part in parts])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def check_adjoint(operator: LinearOperator, graph: Graph, where: str) -> None:
    """Raise an error where forward products of a `jacobian` may be wrong without an error of their own.

    They differentiate a backward pass, which a ``torch.autograd.Function`` written by the user need not allow
    (``once_differentiable``, or detached tensors).

    Args:
        operator: with an adjoint.
        graph: from which the operator was made.
        where: the functions stand, for the message, such as "the network".

    Raises:
        Unmeasurable: if there is such a function and ``<w, A v>`` is not ``<A^T w, v>`` for random v and w.

    Cost: two products where there is such a function.
    """
    if graph.custom and not agrees(operator, 1e-3 if graph.full else 5e-2):
        raise once_differentiable(graph, where)


def once_differentiable(graph: Graph, where: str, otherwise: str = "leave this quantity out") -> Unmeasurable:
    """Return the error for custom functions whose backward cannot be differentiated.

    Args:
        graph: that holds the functions.
        where: they stand, such as "the network".
        otherwise: what to do instead of rewriting them.
    """
    return Unmeasurable(
        f"the backward of {' and '.join(graph.custom)} in {where} cannot be differentiated (it is marked "
        f"once_differentiable, or detaches tensors): write it in operations that can be differentiated, or {otherwise}"
    )


def agrees(operator: LinearOperator, tolerance: float) -> bool:
    """Return whether ``<w, A v>`` is ``<A^T w, v>`` for random v and w; False where a product cannot be computed."""
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


@dataclass(frozen=True)
class Comparison:
    """A product with a second derivative beside a central difference of first derivatives, by their norms.

    Attributes:
        size: of the difference.
        defect: of what the product differs by.
        product: of the product.
        rounding: that the difference may carry: ``4 eps ||gradient|| / distance``.
    """

    size: float
    defect: float
    product: float
    rounding: float

    @classmethod
    def of(cls, product: Tensor, central: Tensor, gradient: Tensor, distance: float) -> Comparison:
        """Return the comparison of a product with a difference of gradients, ``distance`` away to either side."""
        rounding = 4 * torch.finfo(gradient.dtype).eps * float(norm(gradient)) / distance
        return cls(float(norm(central)), float(norm(product - central)), float(norm(product)), rounding)

    @property
    def agrees(self) -> bool:
        """Return whether the two differ by at most 1 %, and by what rounding may have added, at most 2 % more."""
        return self.defect <= 0.01 * self.size + min(self.rounding, 0.02 * self.size)

    @property
    def rounded(self) -> bool:
        """Return whether rounding may hide a difference of 2 %."""
        return self.rounding > 0.02 * self.size

    @property
    def lost(self) -> bool:
        """Return whether product and difference are no larger than rounding."""
        return max(self.size, self.product) <= self.rounding
