"""The largest eigenvalue of a Gram matrix whose statistics were held, replaced by what the batch itself gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lsp_callbacks.operators.sgd.output_directions import OutputDirections
from lsp_callbacks.operators.sgd.per_sample_gradients import whole_seeds
from lsp_callbacks.step.probe_set import ProbeSet


def corrected(
    gram: Tensor,
    probes: ProbeSet,
    directions: OutputDirections,
    roots: Mapping[str, Tensor],
    correction: float | None,
) -> tuple[Tensor, float]:
    """Return a Gram matrix with held statistics whose largest eigenvalue is replaced by what the batch itself gives.

    ``c^T K c = ||D^(1/2) J^T c||^2`` for its top eigenvector c, by one backward pass through the statistics. What they
    add several layers ahead makes the eigenvalue too large, up to twice; the others stay as they are.

    Args:
        gram: with held statistics.
        probes: the samples.
        directions: what the rows stand for.
        roots: of the diagonal of D, by name.
        correction: the factor, where it is known; None finds it.

    Returns:
        The matrix, and the factor.

    Cost: a forward and a backward pass, without a known factor.
    """
    if correction is not None or not float(gram.trace()) > 0:
        correction = 1.0 if correction is None else correction
        return with_top(gram, correction), correction
    values, vectors = torch.linalg.eigh(gram)
    c, exact, lo = vectors[:, -1], 0.0, 0
    top = float(values[-1])
    for index, part in enumerate(probes.parts):
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            outputs = part().outputs
        seeds = directions.seeds[index]
        taken = directions.taken[index][0] if index in directions.taken else torch.arange(len(outputs))
        weights = torch.zeros(len(outputs), len(seeds), dtype=c.dtype)
        weights[taken] = c[lo : lo + len(taken) * len(seeds)].view(-1, len(seeds))
        lo += len(taken) * len(seeds)
        scaled = [seed.scaled(w) for seed, w in zip(seeds, weights.to(outputs).unbind(1))]
        total = whole_seeds(scaled, outputs)
        whole = torch.autograd.grad(outputs, list(probes.parameters.values()), total, allow_unused=True)
        exact += sum(
            float(torch.linalg.vector_norm(roots[name] * g.to_dense(), dtype=torch.float64)) ** 2
            for name, g in zip(probes.parameters, whole)
            if g is not None
        )
    return gram + (exact - top) * c[:, None] * c, exact / top


def with_top(gram: Tensor, factor: float) -> Tensor:
    """Return a Gram matrix with its largest eigenvalue times a factor."""
    if factor == 1:
        return gram
    values, vectors = torch.linalg.eigh(gram)
    c = vectors[:, -1]
    return gram + (factor - 1) * float(values[-1]) * c[:, None] * c
