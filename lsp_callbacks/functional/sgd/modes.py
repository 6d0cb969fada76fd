"""The directions that the samples feel, and the rule by which one step acts on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

Rates = TypeVar("Rates", float, Tensor)


@dataclass(frozen=True)
class UpdateRule:
    """A step with a frozen preconditioner: ``v+ = delta v + phi m + b1 u``, ``m+ = beta m + b2 u``, ``u = H' v``.

    Attributes:
        momentum: ``beta``.
        dampening: ``tau``; ignored without momentum, as torch does. Adam-style averaging is ``tau = beta``.
        nesterov: requires ``dampening = 0``.
        weight_decay: coupled, ``H' = H_B + weight_decay``.
        decoupled_decay: AdamW's, ``delta = 1 - lr decoupled_decay``.
        correction: Adam's ``c1 = 1 - beta1^t``: the gradient part of a step is ``lr / c1``.
        direct: a, what a step takes of the gradient itself beside the momentum, as NAdam does: ``m+ + a u``.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0
    correction: float = 1.0
    direct: float = 0.0

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.nesterov and self.dampening:
            raise ValueError("Nesterov momentum has no dampening: set one of the two to its default")
        if self.nesterov and self.direct:
            raise ValueError("Nesterov momentum has its share of the gradient already: leave direct out")

    def coefficients(self, lr: Rates) -> tuple[Rates, Rates, float, Rates, float]:
        """Return ``(delta, phi, beta, b1, b2)`` at one rate, or at several."""
        beta, rate = self.momentum, lr / self.correction
        delta = 1 - lr * self.decoupled_decay
        if not beta:
            return delta, 0 * rate, 0.0, -rate * (1 + self.direct), 0.0
        if self.nesterov:
            return delta, -rate * beta**2, beta, -rate * (1 + beta), 1.0
        gain = 1 - self.dampening
        return delta, -rate * beta, beta, -rate * (gain + self.direct), gain

    def scaled_coefficients(self, lr: Tensor) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
        """Return the coefficients where ``m`` is multiplied by the rate, which has the units of ``v``."""
        delta, _, beta, b1, b2 = self.coefficients(lr)
        return delta, self.coefficients(torch.ones_like(lr))[1], beta, b1, lr * b2


PLAIN = UpdateRule()


@dataclass(frozen=True)
class Modes:
    """The directions that the samples feel: ``H = diag(curvatures)``, ``H_B = (1/B) sum_{i in B} Y_i^T Y_i``.

    Attributes:
        factor: ``Y``, ``(N, outputs, r)``.
        curvatures: eigenvalues of the mean Hessian, ``(r,)``, descending.
        owner: component of each mode, ``(r,)``. A mode is exactly zero on the samples of the others.
        components: indices of samples that share no mode with the rest; SGD never couples them.
        trace: of the mean Hessian. With ``rank`` it distinguishes a stable network from a collapsed one.
        together: samples that batch statistics tie together, ``g``; 1 where no sample depends on another. Each ``g``
            consecutive samples are a batch that was normalised by itself.
        chance: ``(N, 1)``, where only some of the N samples were looked at: the probability by which each was, with
            ``Y_i`` divided by its root; those that were not have ``Y_i = 0``. None where all were.
    """

    factor: Tensor
    curvatures: Tensor
    owner: Tensor
    components: list[Tensor]
    trace: float
    together: int = 1
    chance: Tensor | None = None

    @cached_property
    def rank(self) -> int:
        return len(self.curvatures)

    @cached_property
    def samples(self) -> int:
        return len(self.factor)

    def shares(self, batch_size: int) -> tuple[int, float]:
        """Return ``(G, w^2)``, by which the noise of a batch of tied samples is put together, see `sgd_exponent`.

        Of M groups G whole ones are drawn, ``G g >= B``. That has the variance of a batch of G g samples, less the
        share 1 / M that is lost to the mean of M; what is missing for B samples is that of samples drawn within them.
        """
        groups = -(-batch_size // self.together)
        return groups, 1 - (1 - self.together / self.samples) * batch_size / (groups * self.together)


def reduced_modes(
    gram: Tensor,
    outputs: int = 1,
    *,
    tol: float | None = None,
    together: int = 1,
    samples: int | None = None,
    chance: Tensor | None = None,
) -> Modes:
    """Return the coordinates Y of ``K = U L U^T = Y Y^T`` without its null space, component by component.

    Args:
        gram: ``K = Z Z^T``, ``Z_i = S_i^{1/2} J_i``, ``(N outputs, N outputs)``, sample-major.
        outputs: rows of a sample.
        tol: eigenvalues up to ``tol`` times the largest are dropped; 1e-12 fits float64, a float32 K needs about 1e-6.
        together: samples of a batch with statistics of its own, see `Modes`.
        samples: how many there are, where K is that of some of them, taken by chance.
        chance: by which probabilities; its rows are then divided by their roots.

    Raises:
        ValueError: if ``gram`` is not a finite symmetric matrix of whole samples, or of whole such batches.

    Cost: one ``eigh`` of each component.
    """
    gram = _checked(gram, outputs)
    n, blocks = len(gram) // outputs, _components(gram, outputs)
    if together < 1 or n % together:
        raise ValueError(f"together={together} must divide the {n} samples")
    total = samples or n
    rows = torch.arange(len(gram)).view(n, outputs)
    pairs = [torch.linalg.eigh(gram[rows[b].flatten()][:, rows[b].flatten()]) for b in blocks]
    floor = (1e-12 if tol is None else tol) * max((float(values[-1]) for values, _ in pairs), default=0.0)
    factor = gram.new_zeros(n, outputs, len(gram))
    curvatures: list[Tensor] = []
    owner: list[Tensor] = []
    for label, (block, (values, vectors)) in enumerate(zip(blocks, pairs)):
        keep, start = values > max(floor, 0.0), sum(len(c) for c in curvatures)
        part = (vectors[:, keep] * values[keep].sqrt()).view(len(block), outputs, -1)
        factor[block, :, start : start + part.shape[-1]] = part
        curvatures.append(values[keep] / total)
        owner.append(torch.full((part.shape[-1],), label))
    order = torch.cat(curvatures).argsort(descending=True)
    # The trace of K itself, not of what was kept.
    trace = float(gram.trace()) / total
    values, labels = torch.cat(curvatures)[order], torch.cat(owner)[order]
    factor = factor[..., order].contiguous()
    if chance is not None and total > n:
        factor = torch.cat([factor, factor.new_zeros(total - n, *factor.shape[1:])])
        chance = torch.cat([chance.to(factor), factor.new_ones(total - n)])[:, None]
        return Modes(factor, values, labels, blocks, trace, together, chance)
    return Modes(factor, values, labels, blocks, trace, together)


def in_units(modes: Modes, rule: UpdateRule) -> tuple[Modes, UpdateRule, float]:
    """Return the same problem with its largest curvature, or decay, near 1: a rate there is ``unit`` times that here.

    A saturated or a dying network has curvatures whose squares, or which themselves in float32, are 0. The unit is a
    power of two: nothing is rounded.

    Returns:
        Modes, rule and ``unit``, which is 1 at rank 0.
    """
    if not modes.rank:
        return modes, rule, 1.0
    largest = max(float(modes.curvatures.max()) + rule.weight_decay, rule.decoupled_decay)
    exponent = 2 * round(math.frexp(largest)[1] / 2)  # even, as the factor is divided by its root
    unit = math.ldexp(1.0, max(-1000, min(1000, exponent)))
    scaled = replace(
        modes, factor=modes.factor / unit**0.5, curvatures=modes.curvatures / unit, trace=modes.trace / unit
    )
    return scaled, in_unit(rule, unit), unit


def in_single_precision(modes: Modes) -> Modes:
    """Return the modes in float32, twice as fast and with a rounding far below the noise of a simulation."""
    return replace(modes, factor=modes.factor.float(), curvatures=modes.curvatures.float())


def in_unit(rule: UpdateRule, unit: float) -> UpdateRule:
    """Return the rule where curvatures are divided by ``unit``, and rates multiplied."""
    if not (rule.weight_decay or rule.decoupled_decay):
        return rule
    return replace(rule, weight_decay=rule.weight_decay / unit, decoupled_decay=rule.decoupled_decay / unit)


def drawn_from(samples: int, batch_size: int, population: int | None) -> int:
    """Return how many training samples batches are drawn from: ``population``, or all ``samples``.

    Raises:
        ValueError: if a batch, or the samples themselves, could not be drawn from them.
    """
    total = samples if population is None else population
    if total < samples:
        raise ValueError(f"population={total} is smaller than the {samples} samples that were drawn from it")
    if not 1 <= batch_size <= total:
        raise ValueError(f"batch_size={batch_size} must lie in 1 ... {total}, the number of training samples")
    return total


def noise_share(total: int, batch_size: int, replacement: bool) -> float:
    """Return the weight p of the single samples in `second_moment`, of batches drawn from so many."""
    return 1 / batch_size if replacement else (total - batch_size) / (batch_size * max(total - 1, 1))


def regularity(gram: Tensor, lr: float, outputs: int = 1) -> tuple[float, int]:
    """Return how far a minimum is from violating Chemnitz & Engel 2025, definition 2.2.

    Returns:
        The smallest ``|eigenvalue|`` of ``I - lr K_ii`` over samples (0: a step with that sample alone is singular),
        and the number of components (more than 1: the samples split into parts that no step couples).
    """
    gram = _checked(gram, outputs)
    n = len(gram) // outputs
    blocks = gram.view(n, outputs, n, outputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return float((1 - lr * torch.linalg.eigvalsh(blocks)).abs().min()), len(_components(gram, outputs))


def _checked(gram: Tensor, outputs: int) -> Tensor:
    gram = gram.detach().double().cpu()
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or outputs < 1 or len(gram) % outputs or not len(gram):
        raise ValueError(f"gram has shape {tuple(gram.shape)}: pass (N outputs, N outputs) with outputs={outputs}")
    if not bool(gram.isfinite().all()):
        raise ValueError("gram is not finite: measure where the network still is, or skip this step")
    if (gram - gram.mT).abs().max() > 1e-5 * gram.abs().max():
        raise ValueError("gram is not symmetric: pass Z Z^T, rows and columns in the same order")
    return (gram + gram.mT) / 2


def _components(gram: Tensor, outputs: int) -> list[Tensor]:
    n = len(gram) // outputs
    size = gram.abs().view(n, outputs, n, outputs).amax((1, 3))
    scale = size.diagonal().sqrt()
    linked = (size > 1e-9 * scale * scale[:, None]) | torch.eye(n, dtype=torch.bool)
    labels = torch.arange(n)
    if bool(linked.all()):
        return [labels]
    while True:  # each sample takes the smallest label around it; following labels of labels makes long chains short
        lowest = torch.where(linked, labels, n).amin(1)
        lowest = lowest[lowest]
        if torch.equal(lowest, labels):
            return [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
        labels = lowest
