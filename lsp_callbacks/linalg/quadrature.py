"""The distribution of a symmetric operator's eigenvalues: Gauss quadrature of its spectral measure, by Lanczos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg.lanczos import lanczos
from lsp_callbacks.linalg.operator import LinearOperator


@dataclass(frozen=True)
class Quadrature:
    """``v^T f(A) v = sum_j weights_j f(nodes_j)`` for a unit vector v: exact for polynomials of degree ``2 k - 1``.

    Attributes:
        nodes: ``(k,)``, ascending: the Ritz values of k Lanczos steps from v.
        overlaps: ``(k,)``: of v with the Ritz vectors.
        couplings: ``(k,)``: of the Ritz vectors with the next Lanczos vector; their absolute values are the residuals.
        cross: ``(k,)``: squared overlaps of the Ritz vectors with the start of another run, as a unit vector.
    """

    nodes: Tensor
    overlaps: Tensor
    couplings: Tensor
    cross: Tensor

    @property
    def weights(self) -> Tensor:
        """Return the weights, ``(k,)``, not negative, of sum 1."""
        return self.overlaps.square()

    @property
    def residuals(self) -> Tensor:
        """Return ``||A u - node u||``, ``(k,)``: some eigenvalue lies within this distance of the node."""
        return self.couplings.abs()

    def masses(self, point: float = 0.0, *, width: float = 0.0) -> Tensor:
        """Return the mass that lies below ``point``, the mass that may lie at it, and the mass that lies above it.

        The weights of the Gauss-Radau rule with a node at ``point``. By the inequalities of Chebyshev, Markov and
        Stieltjes the first and the last are lower bounds of v's spectral measure on either side, and no better ones
        follow from the same moments; the mass that is not separated from ``point`` counts as lying there.

        Args:
            point: where to cut.
            width: nodes nearer than this lie at the point, too: the accuracy of the products.

        Returns:
            ``(3,)``, of sum 1; NaN where a node is.

        Source: Golub & Meurant 2010, sections 6.2 and 10.1.
        """
        if not bool(torch.isfinite(self.nodes).all()):
            return torch.full((3,), torch.nan, dtype=torch.float64)
        away = self.nodes - point
        # T bordered by its next coupling, in the basis of its own eigenvectors; the corner makes it singular.
        k = len(away)
        bordered = torch.zeros(k + 1, k + 1, dtype=torch.float64)
        bordered[:k, :k] = away.diag()
        bordered[k, :k] = bordered[:k, k] = self.couplings
        # A node at the point itself cannot be one twice: the corner then goes to infinity, and with it the other.
        tiny = torch.finfo(torch.float64).eps * torch.maximum(away.abs().max(), self.residuals.max())
        safe = torch.where(away.abs() > tiny, away, torch.where(away < 0, -tiny, tiny))
        bordered[k, k] = torch.where(self.couplings == 0, 0.0, self.couplings.square() / safe).sum()
        nodes, vectors = torch.linalg.eigh(bordered)
        weights = (self.overlaps @ vectors[:k]).square()
        zero = nodes.abs() <= width
        zero[nodes.abs().argmin()] = True
        below, above = weights[(nodes < 0) & ~zero].sum(), weights[(nodes > 0) & ~zero].sum()
        return torch.stack([below, 1 - below - above, above])


def quadratures(operator: LinearOperator, starts: Tensor, *, steps: int) -> list[Quadrature]:
    """Return a `Quadrature` for each row of ``starts``, by a Lanczos run from each.

    Args:
        operator: symmetric, ``(n, n)``.
        starts: ``(s, n)``. With independent Gaussian rows the mean of the measures estimates the density of the
            eigenvalues, without bias.
        steps: of each run, at most n; a run ends before if it has found all eigenvalues.

    Returns:
        One for each start, in float64 on the CPU. Its ``cross`` is with the start of the run before it, the last one
        for the first: so the eigenvalues that a run has found can be removed from an independent estimate. A run of n
        steps has found all eigenvalues: it is returned alone, with weights ``1 / n`` and nothing to estimate.

    Cost: ``s * steps`` products, and the memory of ``steps`` vectors. Source: Golub & Welsch 1969; Ubaru, Chen & Saad
    2017.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix, quadratures
        >>> A, ones = torch.diag(torch.arange(6.0)), torch.ones(1, 6)
        >>> (run,) = quadratures(from_matrix(A), ones, steps=3)
        >>> round(float(run.weights @ run.nodes), 3), round(float(run.weights @ run.nodes**5), 1)  # degree 2 * 3 - 1
        (2.5, 737.5)
    """
    units = starts / torch.linalg.vector_norm(starts, dim=-1, keepdim=True)
    runs: list[Quadrature] = []
    for index in range(len(starts)):
        runs.append(_quadrature(operator, units[index], units[index - 1], steps))
        n = len(units[index])
        if len(runs[-1].nodes) == n and steps >= n:
            root = torch.full((n,), n**-0.5, dtype=torch.float64)
            return [Quadrature(runs[-1].nodes, root, torch.zeros_like(root), root.square())]
    return runs


def _quadrature(operator: LinearOperator, start: Tensor, other: Tensor, steps: int) -> Quadrature:
    """Return one quadrature; in a separate function, so that the basis of a run is freed before the next begins."""
    ritz = lanczos(operator, start, steps=steps, tol=0.0, ends=(0, -1))
    last = ritz.coefficients[-1]
    beta = torch.linalg.vector_norm(ritz.residuals)  # the rows of the coefficients have norm 1
    cross = ritz.coefficients.mT @ (ritz.basis @ other).double().cpu()
    return Quadrature(ritz.values, ritz.coefficients[0].clone(), beta * last, cross.square())
