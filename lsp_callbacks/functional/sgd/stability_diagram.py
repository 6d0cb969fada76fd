"""The diagram of exponents and edges over learning rate and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.modes import PLAIN, Modes, UpdateRule, in_single_precision, in_units
from lsp_callbacks.functional.sgd.sgd_stability import Sampling, critical_lr, sgd_exponent


@dataclass(frozen=True)
class StabilityDiagram:
    """Exponents over batch sizes (rows) and rates (columns), and the edges of each batch size.

    Attributes:
        lrs: ``(L,)``, ascending.
        batch_sizes: ``(S,)``.
        lyapunov: ``(S, L)``, nats per step.
        error: ``(S, L)``, its standard error.
        critical_lr: ``(S,)``, the smallest rate at which lambda turns positive.
        critical_error: ``(S,)``, its standard error.
        mean_square_lr: ``(S,)``, of i.i.d. batches.
    """

    lrs: Tensor
    batch_sizes: Tensor
    lyapunov: Tensor
    error: Tensor
    critical_lr: Tensor
    critical_error: Tensor
    mean_square_lr: Tensor


def stability_diagram(
    modes: Modes,
    *,
    lrs: Tensor | None = None,
    batch_sizes: list[int] | None = None,
    rule: UpdateRule = PLAIN,
    sampling: Sampling = "iid",
    replacement: bool = False,
    population: int | None = None,
    chains: int = 8,
    steps: int = 300,
    burn_in: int = 50,
    generator: torch.Generator | None = None,
) -> StabilityDiagram:
    """Return exponents over (rate, batch size), with the critical and the mean-square rate of each batch size.

    Args:
        lrs: None takes 24 in a geometric row, from half of the lowest edge to twice the highest.
        batch_sizes: None takes the powers of two up to the population, at most four times the samples, and the
            population itself where it is that small.
        modes, rule, sampling, replacement, population, chains, steps, burn_in, generator: see `sgd_exponent`.

    Raises:
        ValueError: if the network is collapsed (rank 0) and ``lrs`` is None, or if the batches cannot be drawn.

    Cost: for each batch size one `critical_lr` and one `sgd_exponent` over all rates.
    """
    total = population or modes.samples
    if batch_sizes is None:
        most = min(total, 4 * modes.samples)
        batch_sizes = sorted(
            {2**k for k in range(most.bit_length()) if 2**k <= most} | ({total} if total == most else set())
        )
    draw: dict[str, Any] = {"rule": rule, "sampling": sampling, "replacement": replacement, "population": population}
    draw |= {"chains": chains, "steps": steps, "burn_in": burn_in, "generator": generator}
    edges = [critical_lr(modes, batch_size=size, **draw) for size in batch_sizes]
    critical, errors, mean_square = torch.tensor(
        [(e.value, e.error, e.mean_square) for e in edges], dtype=torch.float64
    ).T
    if lrs is None:
        finite = torch.cat([critical, mean_square])
        finite = finite[finite.isfinite()]
        if not len(finite):
            raise ValueError("no finite edge to choose rates from (a collapsed network?): pass lrs")
        lrs = torch.logspace(
            float((finite.min() / 2).log10()), float((finite.max() * 2).log10()), 24, dtype=torch.float64
        )
    scaled, draw["rule"], unit = in_units(modes, rule)
    modes = in_single_precision(scaled)
    rows = [sgd_exponent(modes, lrs * unit, batch_size=size, **draw) for size in batch_sizes]
    return StabilityDiagram(
        lrs=lrs,
        batch_sizes=torch.tensor(batch_sizes),
        lyapunov=torch.stack([row.value for row in rows]),
        error=torch.stack([row.error for row in rows]),
        critical_lr=critical,
        critical_error=errors,
        mean_square_lr=mean_square,
    )
