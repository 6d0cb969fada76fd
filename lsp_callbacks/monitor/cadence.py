"""At which steps a measurement starts: at fixed ones, or denser near the edge of stability, within a budget."""

from __future__ import annotations

import math
from typing import Any

from lsp_callbacks._validation import number, whole

#: Share of the budget that the model of the cost may spend. The rest is for what it does not see: the calls of each
#: step, copies of the module, cold starts.
MODELLED = 0.5
#: Of the period: the longest gap between measurements far from the edge, and one over the shortest near it.
SPREAD = 3.0
#: Readings whose mean is the Courant number.
RECENT = 3


def spacing(courant: float) -> float:
    """Gap between measurements in periods, ``3^(2 - 4 courant)`` held within 1/3 and 3; 1 where nothing is known.

    3 below a Courant number of 1/4, 1 at 1/2, 1/3 from 3/4 on: a rate that grows is met well before the edge.

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

    A whole ``every_n_steps`` is obeyed exactly; where such a step is skipped, the next one stands for it. Otherwise
    the *period* is ``cost / budget`` steps, and the next measurement starts ``period * spacing(courant)`` steps after
    the last, if the account allows it. With n measurements started in the s steps since the first, gradients by the
    cost model obey at any time

        ``n * cost <= budget * s + cost``

    The last term is the advance: the first measurement. Fixed periods keep the same account. What is saved far from the
    edge is spent near it; a run that is near it from its first step on has nothing saved: once in a period.

    Args:
        every_n_steps: start a measurement every so many steps; None keeps to the budget.
        budget: gradients spent on measuring, as a share of those spent on training.

    Raises:
        ValueError: for a cadence below 1 or a budget outside (0, 1].

    Attributes:
        origin: step of the first measurement; None before it.
        period: steps; None until the first measurement has told its cost.
        spent: gradients, of all measurements that were started.
    """

    def __init__(self, every_n_steps: int | None = None, budget: float = 0.05):
        if every_n_steps is not None:
            whole("every_n_steps", every_n_steps, 1, instead=", or None for the budget")
        number("budget", budget, above=0, most=1, instead=": a share of the training cost")
        self.every_n_steps, self.budget = every_n_steps, budget
        self.reset()

    def reset(self) -> None:
        """As before a first run."""
        self.origin: int | None = None
        self.period: int | None = self.every_n_steps
        self.cost = self.spent = 0.0
        self._started: int | None = None
        self._unpriced = 0
        self._longest = 1
        self._readings: list[float] = []
        self._asked: tuple[int, bool] | None = None

    def starts(self, step: int, *, scheduled: float = math.nan) -> bool:
        """Whether a measurement starts at this step; the first answer for a step stands.

        Args:
            step: of the optimizer.
            scheduled: the Courant number of the rate that this step will use, where that is known.
        """
        if self._asked is None or self._asked[0] != step:
            # Every number that enters is the same on all processes. Should that ever fail, they would wait for each
            # other for ever: this is the one place where rank 0's answer could be broadcast.
            self._asked = (step, self._starts(step, scheduled))
        return self._asked[1]

    @property
    def _missed(self) -> bool:
        """Whether the last step that was asked for was due and never came: `training_step` returned None."""
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
        """The largest of what is known: too early costs a measurement, too late an alarm."""
        mean = sum(self._readings) / len(self._readings) if self._readings else math.nan
        known = [one for one in (mean, *self._readings[-1:], scheduled) if not math.isnan(one)]
        return max(known, default=math.nan)

    def started(self, step: int) -> None:
        """A measurement has started at this step."""
        self.origin = step if self.origin is None else self.origin
        self._started = step
        self._unpriced += self.period is None
        self.spent += self.cost

    def priced(self, gradients: float, longest: int) -> None:
        """A measurement has shown what one costs.

        Args:
            gradients: by the cost model.
            longest: steps that a measurement takes; the next does not start before its end.
        """
        # The one that has shown it was charged at the cost before, or not at all.
        self.spent += self._unpriced * gradients if self._unpriced else gradients - self.cost
        self.cost, self._longest, self._unpriced = gradients, longest, 0
        if self.every_n_steps is None:
            self.period = max(longest, math.ceil(gradients / self.budget))

    def read(self, courant: float) -> None:
        """Takes in a new reading of the Courant number."""
        if not math.isnan(courant):
            self._readings = [*self._readings, courant][-RECENT:]

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "origin": self.origin, "period": self.period, "cost": self.cost, "spent": self.spent,
            "started": self._started, "unpriced": self._unpriced, "longest": self._longest,
            "readings": list(self._readings),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state, with this cadence's own settings."""
        self.reset()
        if self.every_n_steps is None and state["period"] is not None and not state["cost"]:
            return  # its cost was never asked for
        self.origin, self.cost, self.spent = state["origin"], state["cost"], state["spent"]
        self._started, self._unpriced, self._longest = state["started"], state["unpriced"], state["longest"]
        self._readings = list(state["readings"])
        self.period = self.every_n_steps or state["period"]
        if self.every_n_steps is None and self.cost:  # the budget may be another one now
            self.period = max(self._longest, math.ceil(self.cost / self.budget))
