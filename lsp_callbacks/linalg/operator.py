"""A linear map that is given by its products, and norms of vectors, which neither overflow nor underflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg.vector_parts import VectorParts

Product = Callable[[Tensor], Tensor]
#: Norms of float32 vectors between these have lost nothing to overflow or underflow of squares.
LOW, HIGH = 1e-12, 1e18
#: Products that are summed in float32, before the sums are summed in float64; and inner products from which on those
#: that have lost digits to underflow do not count.
_CHUNK, _LEAST = 1024, 1e-24


@dataclass(frozen=True)
class LinearOperator:
    """A matrix ``A`` of shape ``(m, n)``, given by ``x -> A x`` and ``y -> A^T y``.

    Vectors lie on the last axis. With ``batch = (S,)`` the operator is a family of ``S`` matrices (one for
    each sample, say) that act on the rows of an ``(S, n)`` tensor.

    Args:
        shape: ``(m, n)``, range and domain.
        apply: ``x -> A x``, from ``(*batch, n)`` to ``(*batch, m)``.
        adjoint: ``y -> A^T y``; the same callable as ``apply`` where A is symmetric, None where unknown.
        batch: leading axes.
        dtype: of the vectors.
        device: of the vectors.
        matrix: A itself, where it is at hand.
        parts: how vectors lie on several processes; None where this one holds all of each.
    """

    shape: tuple[int, int]
    apply: Product
    adjoint: Product | None = None
    batch: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    matrix: Tensor | None = None
    parts: VectorParts | None = None

    def dots(self, vectors: Sequence[Tensor], other: Tensor) -> Tensor:
        """Return the inner products of some vectors of its domain with another one."""
        if self.parts is None:
            return torch.stack([torch.dot(v, other) for v in vectors])
        other = self.parts.once(other)
        return self.parts.total(torch.stack([torch.dot(v, other) for v in vectors]))

    def norm(self, v: Tensor) -> Tensor:
        """Return the norm of a vector of its domain, in float64."""
        return norm(v) if self.parts is None else total_norm(v, self.parts)

    def __matmul__(self, other):
        if isinstance(other, Tensor):
            return self.apply(other)
        adjoint = None
        if self.adjoint is not None and other.adjoint is not None:
            adjoint = _chain(other.adjoint, self.adjoint)
        return replace(
            self,
            shape=(self.shape[0], other.shape[1]),
            apply=_chain(self.apply, other.apply),
            adjoint=adjoint,
            matrix=None,
        )

    def __add__(self, other: LinearOperator) -> LinearOperator:
        adjoint = None
        if self.adjoint is not None and other.adjoint is not None:
            adjoint = _sum(self.adjoint, other.adjoint)
        return replace(self, apply=_sum(self.apply, other.apply), adjoint=adjoint, matrix=None)

    def __rmul__(self, scale: float | Tensor) -> LinearOperator:
        """Return ``scale * A``; a tensor scales the rows, ``diag(scale) A``."""
        inner = self.adjoint
        return replace(
            self,
            apply=lambda x: scale * self.apply(x),
            adjoint=None if inner is None else lambda y: inner(scale * y),
            matrix=None,
        )

    @property
    def T(self) -> LinearOperator:
        """Return the transpose."""
        if self.adjoint is None:
            raise ValueError("this operator has no adjoint: construct it with adjoint=...")
        matrix = None if self.matrix is None else self.matrix.mT
        return replace(self, shape=self.shape[::-1], apply=self.adjoint, adjoint=self.apply, matrix=matrix)

    def dense(self) -> Tensor:
        """Return the matrix itself, ``(*batch, m, n)``, by ``n`` products. For tests and small operators."""
        columns = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return torch.stack([self.apply(e.expand(*self.batch, -1).clone()) for e in columns], dim=-1)


def _chain(outer: Product, inner: Product) -> Product:
    return lambda x: outer(inner(x))


def _sum(first: Product, second: Product) -> Product:
    return lambda x: first(x) + second(x)


def from_matrix(matrix: Tensor) -> LinearOperator:
    """Return the operator of a dense matrix ``(*batch, m, n)``."""
    return LinearOperator(
        shape=(matrix.shape[-2], matrix.shape[-1]),
        apply=lambda x: (matrix @ x[..., None])[..., 0],
        adjoint=lambda y: (matrix.mT @ y[..., None])[..., 0],
        batch=tuple(matrix.shape[:-2]),
        dtype=matrix.dtype,
        device=matrix.device,
        matrix=matrix,
    )


def identity_like(operator: LinearOperator) -> LinearOperator:
    """Return the identity on the domain of a square operator."""
    return replace(operator, apply=torch.clone, adjoint=torch.clone, matrix=None)


def norm(v: Tensor, dim: int | None = None, *, keepdim: bool = False) -> Tensor:
    """Return ``||v||`` in float64: squares of float32 numbers below 1e-19 or above 1e19 leave the range of float32.

    Args:
        v: a tensor.
        dim: of the vectors; None is the norm of all numbers.
        keepdim: keep that axis, with length 1.

    Cost: on a CPU one pass in the type of v, and one in float64 where the first is not accurate.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import norm
        >>> v = torch.tensor([3e-30, 4e-30])
        >>> round(1e30 * float(norm(v)), 6), float(torch.linalg.vector_norm(v))
        (5.0, 0.0)
    """
    if v.dtype == torch.float32 and v.device.type == "cpu":  # a sum in float64 takes ten times as long there
        size = torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim)
        is_accurate = LOW < float(size) < HIGH if dim is None else bool(((size > LOW) & (size < HIGH)).all())
        if is_accurate:
            return size.double()
    return torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim, dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> float:
    """Return ``<a, b>`` of flat vectors, accurate to some ``1e-7 ||a|| ||b||`` whatever their length.

    On a CPU sums of 1024 products are taken in float32, and their sum in float64, which takes half the time of a
    conversion of both; where that may have underflowed or has overflowed, all of it is in float64.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import inner
        >>> inner(torch.tensor([1e-30, 0.0]), torch.tensor([1e-30, 2.0]))  # doctest: +ELLIPSIS
        1.0...e-60
    """
    if len(a) >= _CHUNK and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu":
        whole = len(a) // _CHUNK * _CHUNK
        rows, columns = a[:whole].view(-1, _CHUNK), b[:whole].view(-1, _CHUNK)
        product = float(torch.linalg.vecdot(rows, columns).sum(dtype=torch.float64) + torch.dot(a[whole:], b[whole:]))
        if _LEAST < abs(product) < HIGH:
            return product
    return float(a.double() @ b.double())


def total_norm(v: Tensor, parts: VectorParts) -> Tensor:
    """Return the `norm` of a vector of which this process holds a part; the same on all processes."""
    return parts.total(norm(parts.once(v, 0.5)).square()[None])[0].sqrt()


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the `norm` of each tensor."""
    return [norm(t) for t in tensors]


def power_iteration(matrices: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the last two of ``v, A u(v), ...`` for a batch of matrices A, where u divides by the norm.

    Args:
        matrices: ``(*batch, n, n)``.
        start: ``(*batch, n)``.
        steps: products.
    """
    before = after = start
    for _ in range(steps):
        before, after = after, (matrices @ unit(after)[..., None])[..., 0]
    return before, after


def unit(v: Tensor) -> Tensor:
    """Return each row divided by its `norm`, in the type of v; rows of zeros stay.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import unit
        >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    size = norm(v, -1, keepdim=True)
    return (v / torch.where(size > 0, size, 1.0)).to(v.dtype)
