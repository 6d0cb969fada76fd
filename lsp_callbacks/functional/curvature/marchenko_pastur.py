"""The law of Marchenko and Pastur, and whether a bulk of eigenvalues looks like it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Nodes of the law's own quadrature.
POINTS = 400
#: A bulk that is further off its law does not look like one.
ALIKE = 0.1


@dataclass(frozen=True)
class MarchenkoPastur:
    """Eigenvalues of ``scale * X X^T / N``, X of ``ratio * N`` rows of independent noise, among others that are 0.

    The law of the part that is not 0 has the density ``sqrt((b - x)(x - a)) / (2 pi scale ratio x)`` on ``[a, b] =
    scale (1 -+ sqrt(ratio))^2``. More rows than columns are the same with rows and columns exchanged, and zeros.

    Attributes:
        ratio: in [0, 1].
        scale: the mean of the part that is not 0.
        zero_mass: the share that is 0.
        distance: Kolmogorov's, between the cumulative of the law and the one that was measured, both smoothed by
            ``width``: the largest difference over the share that is not 0, at most 1. A large share at 0 is no merit.
        width: standard deviation of the Gaussian that smooths.
    """

    ratio: float
    scale: float
    zero_mass: float
    distance: float
    width: float

    @property
    def alike(self) -> bool:
        """Return whether the law describes what it was fitted to: only then do its parameters mean anything."""
        return self.distance <= ALIKE

    @property
    def edges(self) -> tuple[float, float]:
        """Return the ends of the part that is not 0."""
        root = math.sqrt(self.ratio)
        return self.scale * (1 - root) ** 2, self.scale * (1 + root) ** 2

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return the law as nodes and weights, the zeros first; ``(POINTS + 1,)`` each."""
        angle = (torch.arange(POINTS, dtype=torch.float64) + 0.5) * (math.pi / POINTS)
        nodes = 1 + self.ratio + 2 * math.sqrt(self.ratio) * angle.cos()
        weights = angle.sin().square() / nodes
        weights = (1 - self.zero_mass) * weights / weights.sum()
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([zero, self.scale * nodes]), torch.cat([zero + self.zero_mass, weights])


def fit_marchenko_pastur(nodes: Tensor, weights: Tensor, *, width: float) -> MarchenkoPastur | None:
    """Fit the law with the first three moments of a measure, and return it with its distance from the measure.

    With a the share that is not 0, the moments are ``a s``, ``a s^2 (1 + q)`` and ``a s^3 (1 + 3 q + q^2)``, so that
    ``m_1 m_3 / m_2^2 - 1 = q / (1 + q)^2``. Where that is not in [0, 1/4], the nearest q is taken; where a is not below
    1, there are no zeros, and the law has the first two moments. Most Hessians do not look like it: read the distance
    before the parameters.

    Args:
        nodes: ``(k,)``.
        weights: ``(k,)``, of any sum.
        width: of the smoothing.

    Returns:
        None where the mean is not positive: there is no such law.

    Source: Marchenko & Pastur 1967; Bai & Silverstein 2010, lemma 3.1 for the moments.

    Example:
        >>> from lsp_callbacks.functional import MarchenkoPastur, fit_marchenko_pastur
        >>> result = fit_marchenko_pastur(*MarchenkoPastur(0.3, 2.0, 0.6, 0.0, 0.1).measure(), width=0.1)
        >>> round(result.ratio, 6), round(result.scale, 6), round(result.zero_mass, 6), round(result.distance, 6)
        (0.3, 2.0, 0.6, 0.0)
    """
    weights = weights / weights.sum()
    first, second, third = (float((weights * nodes**k).sum()) for k in (1, 2, 3))
    if not first > 0:
        return None
    # q / (1 + q)^2 = c; written so that it does not cancel at c = 0.
    c = min(max(first * third / second**2 - 1, 0.0), 0.25)
    ratio = 2 * c / (1 - 2 * c + math.sqrt(1 - 4 * c))
    zero = 1 - first**2 * (1 + ratio) / second
    if zero <= 0:
        zero, ratio = 0.0, min(max(second / first**2 - 1, 0.0), 1.0)
    law = MarchenkoPastur(ratio, first / (1 - zero), zero, math.nan, width)
    law_nodes, law_weights = law.measure()
    everywhere = torch.cat([nodes, law_nodes])
    measured = smoothed_cumulative(nodes, weights, everywhere, width)
    off = measured - smoothed_cumulative(law_nodes, law_weights, everywhere, width)
    return MarchenkoPastur(ratio, law.scale, zero, min(float(off.abs().max()) / (1 - zero), 1.0), width)


def smoothed_density(nodes: Tensor, weights: Tensor, points: Tensor, width: float) -> Tensor:
    """Return ``sum_j weights_j N(points; nodes_j, width^2)``, whose integral is the sum of the weights.

    Args:
        nodes: ``(k,)``.
        weights: ``(k,)``.
        points: ``(p,)``.
        width: standard deviation; details that are finer than it are not seen.

    Source: Lin, Saad & Yang 2016; Ghorbani, Krishnan & Xiao 2019, (4).
    """
    away = (points[:, None] - nodes) / width
    return (-0.5 * away.square()).exp() @ weights / (width * math.sqrt(2 * math.pi))


def smoothed_cumulative(nodes: Tensor, weights: Tensor, points: Tensor, width: float) -> Tensor:
    """Return the integral of `smoothed_density` up to each point."""
    return torch.special.ndtr((points[:, None] - nodes) / width) @ weights
