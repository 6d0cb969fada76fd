"""How perturbations of the input propagate through depth: the forward part of the Learning Stability Profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import Eigenpair, LinearOperator, operator_norm

#: Relative difference up to which a product through a state is the whole product: no path goes around the state.
AROUND = 1e-3


@dataclass(frozen=True)
class DepthProfile:
    """``sigma^x_k = ||dX_k / dX_0||_2`` of each sample at each depth, and what bounds the last of them.

    Attributes:
        sigma: ``(L, samples)``, lower bounds that are exact up to the residual where Lanczos has found the top.
        residual: the largest relative residual of all norms.
        converged: whether all of them reached the tolerance.
        log_bound: ``(samples,)``, ``sum log ||dX_k / dX_j||`` over ``factors``, from above; of all samples, too, with
            the probability that was asked for.
        factors: the steps ``(j, k)`` of the bound: ``(k - 1, k)`` where all paths pass every state, longer ones around
            which a skip path goes.
    """

    sigma: Tensor
    residual: Tensor
    converged: bool
    log_bound: Tensor
    factors: tuple[tuple[int, int], ...]

    @property
    def depth(self) -> int:
        """Return L, the number of layers, by which the exponents are divided."""
        return len(self.sigma)

    @property
    def exponent(self) -> Tensor:
        """Return ``alpha_x = (1/L) log max_samples sigma^x_L``, nats a layer; -inf where X_L does not depend on X_0."""
        return self.sigma[-1].max().log() / self.depth

    @property
    def median(self) -> Tensor:
        """Return the exponent of the median sample."""
        return self.sigma[-1].median().log() / self.depth

    @property
    def bound(self) -> Tensor:
        """Return ``(1/L) max_samples sum log ||J_k||``, nats a layer."""
        return self.log_bound.max() / self.depth


def depth_profile(
    jacobian: Callable[[int, int], LinearOperator],
    depth: int,
    *,
    steps: int = 30,
    tol: float = 1e-2,
    failure: float = 1e-3,
    generator: torch.Generator | None = None,
) -> DepthProfile:
    """Return the forward sensitivities of a network at the inputs that it received, by depth.

    ``alpha_x = (1/L) log sigma^x_L`` takes the *endpoint*: the supremum over all depths from 0 on, as printed, includes
    ``dX_0/dX_0 = I`` and could never be negative. It is divided by the L layers that were travelled, not by L + T,
    which would only dilute it. It is a number of one finite network at these inputs; the limsup of the definition does
    not exist for it. And an exponent of 0 does not mean bounded: ``[[1, 1], [0, 1]]`` at each layer has a norm that
    grows like L, and the exponent falls to 0.

    Args:
        jacobian: ``(k, j) -> dX_k / dX_j`` for ``0 <= j < k <= depth``, with an optional batch axis over samples.
        depth: L.
        steps: at most this many pairs of products a norm.
        tol: on the relative residuals of sigma; the factors of the bound are taken to a tenth of it.
        failure: probability with which ``log_bound`` is none.
        generator: of the starts; a fixed seed otherwise.

    Returns:
        Norms with their residuals, from below. Those in ``log_bound`` start at random, never from the vector of another
        depth, and are bounds by `lsp_callbacks.linalg.spectrum_bounds`: a small residual alone would not make them so.

    Raises:
        ValueError: if depth is below 1.

    Cost: two products a Lanczos step, some ten steps a norm, two norms a layer.

    Source: Katende 2025, Secs. 2 and 4.1; docs/theory.md, section The Learning Stability Profile.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> from lsp_callbacks.functional import depth_profile
        >>> W = torch.tensor([[0.0, -1.2], [0.3, 0.0]], dtype=torch.float64)  # a quarter turn, then diag(1.2, 0.3)
        >>> result = depth_profile(lambda k, j: from_matrix(torch.linalg.matrix_power(W, k - j)), 4)
        >>> round(float(result.exponent), 4), round(float(result.bound), 4)  # 0.5 log 0.36, log 1.2
        (-0.5108, 0.1823)
    """
    if depth < 1:
        raise ValueError(f"depth={depth}: a network has at least one layer")
    whole = jacobian(depth, 0)
    v = _random(whole, generator)
    rare = failure / (depth * max(1, math.prod(whole.batch)))
    norms: list[Eigenpair] = []
    images = [v]
    for k in range(1, depth + 1):
        J = jacobian(k, 0)
        # The vector of the depth before is a good guess, and noise keeps it from hiding the others.
        guess = v if not norms else v / _norm(v) + norms[-1].vector
        norms.append(operator_norm(J, guess, steps=steps, tol=tol))
        images.append(J @ v)
    factors: list[tuple[int, int]] = []
    links: list[Eigenpair] = []
    k = depth
    while k:  # from the end, the shortest step whose product is the whole Jacobian: no path goes around its start
        j = next((j for j in range(k - 1, 0, -1) if _close(jacobian(k, j) @ images[j], images[k])), 0)
        J = jacobian(k, j)
        side = J if J.shape[1] <= J.shape[0] else J.T
        links.append(operator_norm(side, steps=steps, tol=tol / 10, failure=rare, generator=generator))
        factors.append((j, k))
        k = j
    everything = [*norms, *links]
    return DepthProfile(
        sigma=torch.stack([torch.atleast_1d(pair.value) for pair in norms]),
        residual=torch.stack([_relative(pair) for pair in everything]).max(),
        converged=all(pair.converged for pair in everything),
        log_bound=torch.stack([torch.atleast_1d(pair.upper) for pair in links if pair.upper is not None]).log().sum(0),
        factors=tuple(reversed(factors)),
    )


def _close(through: Tensor, whole: Tensor) -> bool:
    return bool((_norm(through - whole) <= AROUND * _norm(whole)).all())


def _relative(pair: Eigenpair) -> Tensor:
    return torch.where(pair.value == 0, 0.0, pair.residual / pair.value).max()


def _random(operator: LinearOperator, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator(operator.device).manual_seed(0)
    shape = (*operator.batch, operator.shape[1])
    return torch.randn(shape, dtype=operator.dtype, device=generator.device, generator=generator).to(operator.device)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
