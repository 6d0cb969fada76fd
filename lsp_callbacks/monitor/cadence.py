"""At which steps a measurement starts: at fixed ones, or denser near the edge of stability, within a budget."""

from __future__ import annotations

import math
from typing import Any

from lsp_callbacks._validation import number, whole

#: Share of the budget that the cost model may spend. The rest is for what it does not count: the calls of each step,
#: copies of the module, cold starts.
MODELLED = 0.5
#: The longest gap between measurements (far from the edge of stability) in periods, and one over the shortest.
SPREAD = 3.0
#: Number of readings whose mean is the Courant number.
RECENT = 3


def spacing(courant: float) -> float:
    """Return the gap between measurements in periods, ``3^(2 - 4 courant)`` clipped to 1/3 ... 3; 1 for NaN.

    It is 3 below a Courant number of 1/4, 1 at 1/2, and 1/3 from 3/4 on: a growing learning rate is measured well
    before it reaches the edge.

    Example:
        >>> from lsp_callbacks.monitor.cadence import spacing
        >>> [round(spacing(courant), 3) for courant in (0.0, 0.25, 0.5, 0.75, 2.0, float("nan"))]
        [3.0, 3.0, 1.0, 0.333, 0.333, 1.0]
    """
    if math.isnan(courant):
        return 1.0
    return SPREAD ** max(-1.0, min(1.0, 2 - 4 * courant))


class Cadence:
    """Decides when measurements start, from numbers that are the same in each run and on each process.

    A given ``every_n_steps`` is followed exactly; if such a step is skipped, the next one takes its place. Otherwise
    the *period* is ``cost / budget`` steps, and the next measurement starts ``period * spacing(courant)`` steps after
    the last, if the budget allows it. With n measurements started in the s steps since the first, gradients by the
    cost model satisfy at any time

        ``n * cost <= budget * s + cost``

    The last term is the first measurement. Unspent budget accumulates while the Courant number is low and is used
    near 1. A run that starts near 1 has none, and is measured once per period.

    Args:
        every_n_steps: start a measurement every so many steps; None keeps to the budget.
        budget: gradients spent on measuring, as a share of those spent on training.

    Raises:
        ValueError: for a cadence below 1 or a budget outside (0, 1].

    Attributes:
        origin: step of the first measurement; None before it.
        period: steps; None until the cost of the first measurement is known.
        spent: gradients of all measurements that were started.
    """

    def __init__(self, every_n_steps: int | None = None, budget: float = 0.05):
        if every_n_steps is not None:
            whole("every_n_steps", every_n_steps, 1, instead=", or None for the budget")
        number("budget", budget, above=0, most=1, instead=": a share of the training cost")
        self.every_n_steps, self.budget = every_n_steps, budget
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.origin: int | None = None
        self.period: int | None = self.every_n_steps
        self.cost = self.spent = 0.0
        self._started: int | None = None
        self._unpriced = 0
        self._longest = 1
        self._readings: list[float] = []
        self._asked: tuple[int, bool] | None = None

    def starts(self, step: int, *, scheduled: float = math.nan) -> bool:
        """Return whether a measurement starts at this step; the first answer for a step is final.

        Args:
            step: number of the optimizer step.
            scheduled: the Courant number of the learning rate that this step will use; NaN if it is not known.
        """
        if self._asked is None or self._asked[0] != step:
            # All numbers here are the same on all processes. If they were not, the processes would wait for each other
            # forever: this is the one place where rank 0's answer could be broadcast.
            self._asked = (step, self._starts(step, scheduled))
        return self._asked[1]

    @property
    def _missed(self) -> bool:
        """Whether the last step asked for was due and was not taken: `training_step` returned None."""
        return self._asked is not None and self._asked[1] and self._started != self._asked[0]

    def _starts(self, step: int, scheduled: float) -> bool:
        if self.origin is None or self.period is None or self._started is None:
            return True
        since = step - self.origin
        if self.every_n_steps is not None:
            return since % self.period == 0 or self._missed
        gap = max(self._longest, self.period * spacing(self._nearest(scheduled)))
        affordable = self.spent <= self.budget * since * (1 + 1e-9)
        return affordable and step - self._started >= gap

    def _nearest(self, scheduled: float) -> float:
        """Return the largest known Courant number: too early costs a measurement, too late an alarm."""
        mean = sum(self._readings) / len(self._readings) if self._readings else math.nan
        courants = [courant for courant in (mean, *self._readings[-1:], scheduled) if not math.isnan(courant)]
        return max(courants, default=math.nan)

    def started(self, step: int) -> None:
        """Charge a measurement that starts at this step."""
        self.origin = step if self.origin is None else self.origin
        self._started = step
        self._unpriced += self.period is None
        self.spent += self.cost

    def priced(self, gradients: float, longest: int) -> None:
        """Set the cost of a measurement, from one that was made.

        Args:
            gradients: by the cost model.
            longest: steps that a measurement takes; the next does not start before its end.
        """
        # That measurement was charged at the cost before, or not at all.
        self.spent += self._unpriced * gradients if self._unpriced else gradients - self.cost
        self.cost, self._longest, self._unpriced = gradients, longest, 0
        if self.every_n_steps is None:
            self.period = max(longest, math.ceil(gradients / self.budget))

    def read(self, courant: float) -> None:
        """Add a new reading of the Courant number."""
        if not math.isnan(courant):
            self._readings = [*self._readings, courant][-RECENT:]

    def state_dict(self) -> dict[str, Any]:
        """Return numbers only."""
        return {
            "origin": self.origin, "period": self.period, "cost": self.cost, "spent": self.spent,
            "started": self._started, "unpriced": self._unpriced, "longest": self._longest,
            "readings": list(self._readings),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with this cadence's own settings."""
        self.reset()
        if self.every_n_steps is None and state["period"] is not None and not state["cost"]:
            return  # its cost was never computed
        self.origin, self.cost, self.spent = state["origin"], state["cost"], state["spent"]
        self._started, self._unpriced, self._longest = state["started"], state["unpriced"], state["longest"]
        self._readings = list(state["readings"])
        self.period = self.every_n_steps or state["period"]
        if self.every_n_steps is None and self.cost:  # the budget may be another one now
            self.period = max(self._longest, math.ceil(self.cost / self.budget))
