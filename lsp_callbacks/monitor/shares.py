"""How the budget is shared out: most of it to the headline number, and more of it near the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lsp_callbacks.monitor.pace import Pace

#: Courant numbers at which the headline number begins to be measured more often, and from which on most often.
FAR, NEAR = 0.5, 0.75
#: Least share of the headline number.
HEADLINE = 0.65
#: Part of the others' budget that goes to the headline number near the edge.
TAKEN = 0.5


def nearness(courant: float) -> float:
    """Return how near the edge of stability a Courant number is, from 0 (below 1/2) to 1 (from 3/4 on); -1 for NaN.

    A growing learning rate is near well before it reaches the edge. In eighths, so that it seldom changes.

    Example:
        >>> from lsp_callbacks.monitor.shares import nearness
        >>> [nearness(courant) for courant in (0.0, 0.5, 0.625, 0.75, 2.0, float("nan"))]
        [0.0, 0.0, 0.5, 1.0, 1.0, -1.0]
    """
    if math.isnan(courant):
        return -1.0
    return math.floor(8 * max(0.0, min(1.0, (courant - FAR) / (NEAR - FAR)))) / 8


def rates(
    paces: Mapping[str, Pace], income: float, headline: str | None, near: float, *, step_cost: float = 1.0
) -> dict[str, float]:
    """Return the gradients that each quantity without a fixed pace may spend at each step.

    Args:
        paces: of all quantities that are measured, by name.
        income: gradients at each step, for all of them.
        headline: name of the quantity that has at least `HEADLINE` of it, as far as it can use that: far from the edge
            one measurement in ``1 / budget`` steps is enough.
        near: a `nearness`.
        step_cost: gradients that a step of training takes.
    """
    weights = {name: pace.weight for name, pace in paces.items() if pace.every_n_steps is None}
    total = sum(weights.values())
    if headline not in weights:
        return {name: income * weight / total for name, weight in weights.items()}
    others = total - weights[headline]
    share = max(HEADLINE, weights[headline] / total) if others else 1.0
    if near >= 0:
        price = paces[headline].price / step_cost or share
        share = (1 - near) * min(share, price) + near * (share + TAKEN * (1 - share))
    rest = {name: income * (1 - share) * weight / others for name, weight in weights.items() if name != headline}
    return rest | {headline: income * share}
