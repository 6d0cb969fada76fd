"""Approximate eigenpairs of a symmetric operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg.operator import norm


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue, its unit vector, and ``residual = ||A v - value v||`` (absolute).

    For symmetric A some exact eigenvalue lies within ``residual`` of ``value``, which need not be the largest; the
    largest is bounded by ``upper``, where it was requested.
    """

    value: Tensor
    vector: Tensor
    residual: Tensor
    products: int
    converged: bool
    upper: Tensor | None = None


@dataclass(frozen=True)
class Ritz:
    """The result of ``k`` Lanczos steps on a symmetric operator.

    Attributes:
        values: ``(*batch, k)``, ascending: approximate eigenvalues, all inside the true spectrum.
        residuals: ``(*batch, k)``: ``||A v - value v||`` of each, in the units of A.
        coefficients: ``(*batch, k, k)``: columns expand the Ritz vectors in ``basis``.
        basis: ``(k, *batch, n)``, orthonormal.
        converged: whether each requested end met the tolerance.
    """

    values: Tensor
    residuals: Tensor
    coefficients: Tensor
    basis: Tensor
    converged: bool

    def pair(self, index: int) -> Eigenpair:
        """Return the Ritz pair at ``index``: 0 is the smallest eigenvalue, -1 the largest."""
        weights = self.coefficients[..., index].to(self.basis)
        vector = torch.einsum("...k,k...n->...n", weights, self.basis)
        return Eigenpair(
            value=self.values[..., index],
            vector=vector / norm(vector, -1, keepdim=True).to(vector.dtype).clamp_min(torch.finfo(vector.dtype).tiny),
            residual=self.residuals[..., index],
            products=len(self.basis),
            converged=self.converged,
        )
