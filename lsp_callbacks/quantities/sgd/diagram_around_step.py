"""Stability diagram whose learning rates and batch sizes include those of a step."""

from __future__ import annotations

import math
from typing import Any

import torch

from lsp_callbacks.functional.sgd.mean_square import gd_critical_lr, mean_square_lr
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram, stability_diagram
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD

#: Smallest number of rates in a diagram, and number of rates in a decade.
RATES, A_DECADE = 24, 12


def diagram_around_step(sgd: FrozenSGD, **settings: Any) -> StabilityDiagram:
    """Return the stability diagram of a frozen step; its batch sizes and rates include those of the step.

    Args:
        sgd: of `lsp_callbacks.operators.sgd.frozen_sgd.frozen_sgd`.
        settings: of `lsp_callbacks.functional.sgd.stability_diagram.stability_diagram`.

    Raises:
        ValueError: if the network is collapsed (rank 0).
    """
    modes, rule, total = sgd.modes, sgd.rule, sgd.population
    most, size = min(total, 4 * modes.samples), min(sgd.batch_size, total)
    sizes = sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {size})
    # From the critical rate of the noisiest batch to that without noise: cheap bounds of all that is searched later.
    edges = [mean_square_lr(modes, batch_size=1, rule=rule, population=total), gd_critical_lr(modes, rule), sgd.lr]
    finite = [rate for rate in edges if 0 < rate < math.inf]
    lrs = None
    if modes.rank and len(finite) > 1:
        low, high = math.log10(min(finite) / 2), math.log10(max(finite) * 2)
        count = max(RATES, round(A_DECADE * (high - low)))
        lrs = torch.logspace(low, high, count, dtype=torch.float64)
    chosen: dict[str, Any] = {"rule": rule, "population": total, "lrs": lrs, "batch_sizes": sizes}
    return stability_diagram(modes, **(chosen | settings))
