"""A linear map that is given by its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg.norms import norm
from lsp_callbacks.linalg.vector_parts import VectorParts

Product = Callable[[Tensor], Tensor]


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
        values = torch.stack([torch.dot(v, other) for v in vectors])
        return values if self.parts is None else self.parts.total(values)

    def norm(self, v: Tensor) -> Tensor:
        """Return the norm of a vector of its domain, in float64."""
        return norm(v) if self.parts is None else self.parts.total(norm(v).square()[None])[0].sqrt()

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
