"""Which measurements start at one step, as far as the account allows it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lsp_callbacks.monitor.pace import Pace
from lsp_callbacks.monitor.shares import HEADLINE, rates
from lsp_callbacks.monitor.spending import Spending

#: By how much shorter the gaps of the headline number are near the edge, as long as there are gradients left over.
SAVED = 2.0
#: By how much shorter the gaps of the others are as long as the account holds more than what all have put by.
HASTE = 2.0


class Choice:
    """Chooses the measurements that start at a step, of those that keep to the budget.

    Args:
        paces: of all quantities that are measured, by name.
        headline: name of the quantity of the headline number; None without one.
        near: nearness to the edge of stability.
        income: gradients that each step adds to the account.
        advance: gradients with which the account began.
        left: gradients in the account.
        step: number of the optimizer step.
        step_cost: gradients that a step of training takes.

    Attributes:
        until: step before which nothing else is due, as long as nothing changes.
    """

    def __init__(
        self,
        paces: Mapping[str, Pace],
        headline: str | None,
        near: float,
        income: float,
        advance: float,
        left: float,
        step: int,
        step_cost: float,
    ):
        self.paces = {name: pace for name, pace in paces.items() if pace.every_n_steps is None}
        self.headline = headline if headline in self.paces else None
        self.near, self.income, self.advance, self.step = near, income, advance, step
        self.account, self.rates = Spending(left), rates(paces, income, headline, near, step_cost=step_cost)
        self.until = -math.inf

    def make(self, busy: Collection[str]) -> list[str]:
        """Return the names of the quantities that start.

        Args:
            busy: those whose measurement is under way.
        """
        due = {name: self._due(name) for name in self.paces}
        # The headline number first; then those never measured, which the advance is for.
        order = sorted(due, key=lambda name: (name != self.headline, self.paces[name].started is not None))
        for name in order:
            if self.headline not in self.account.chosen and self._waits(name):
                due[name] = math.inf
            if due[name] <= self.step and name not in busy:
                due[name] = self._take(name)
        for name in order if self.account.chosen else ():
            if name not in {*self.account.chosen, *busy} and self._meets(name):
                self._take(name)
        self.until = min(due.values(), default=math.inf)
        return self.account.chosen

    def _period(self, name: str) -> float:
        return self.paces[name].price / self.rates[name]

    def _due(self, name: str) -> float:
        """Return the step from which on a measurement starts, if the account allows it."""
        pace = self.paces[name]
        if pace.postponed is not None:
            return pace.postponed
        if pace.parts is None or pace.started is None:
            return -math.inf
        haste = 1 + SAVED * max(self.near, 0.0) if name == self.headline else HASTE
        gap = min(self._period(name) / haste * (1 - 1e-9), pace.doubling)
        return pace.started + max(pace.length, math.ceil(gap))

    def _waits(self, name: str) -> bool:
        """Return whether a measurement is made only beside one of the headline number, which comes more often."""
        if name == self.headline or self.headline is None or self.paces[name].started is None:
            return False
        leader = self.paces[self.headline]
        is_led = leader.started is not None and leader.postponed is None
        return is_led and self._period(self.headline) <= self._period(name)

    def _meets(self, name: str) -> bool:
        """Return whether a measurement beside those of this step is cheaper by as much as it is too early."""
        pace = self.paces[name]
        if name == self.headline or pace.postponed is not None or pace.started is None:
            return False
        return self.step - pace.started >= max(pace.length, self.account.beside(pace) / self.rates[name])

    def _take(self, name: str) -> float:
        """Choose a quantity if the account allows it; return the step at which to ask again."""
        pace = self.paces[name]
        # A price that is not known is found out first.
        missing = 0.0 if pace.parts is None else self.account.beside(pace) + self._kept(name) - self.account.left
        if missing <= 1e-9:
            self.account.choose(name, pace)
            return self.step + 1
        # What it must leave to the others becomes less at the first two of these steps.
        start = self.step if pace.started is None else pace.started
        again = start + math.ceil(self._period(name)), start + pace.doubling
        return min([self.step + math.ceil(missing / self.income), *(step for step in again if step > self.step)])

    def _kept(self, name: str) -> float:
        """Return the gradients that a quantity must leave in the account.

        Others leave to the headline number what its next reading needs, and its first readings. A reading that comes
        before its period is over, such as the first ones, leaves to everybody what they have put by.
        """
        pace, kept = self.paces[name], 0.0
        if pace.is_promised and pace.started is None:
            return 0.0
        is_early = pace.started is not None and self.step - pace.started < self._period(name) * (1 - 1e-9)
        if name == self.headline and pace.early(self._period(name)):
            # Failing runs fail early: its first readings come before the first ones of the others.
            is_early = is_early and self.step - (pace.started or 0) < pace.doubling
        for other, theirs in self.paces.items():
            if other == name or theirs.parts is None:
                continue
            put_by = 0.0 if other in self.account.chosen else theirs.claim(self.step, self.rates[other])
            if other == self.headline:
                first = theirs.early(self._period(other)) - (other in self.account.chosen)
                share = self.advance * HEADLINE - theirs.count * theirs.price
                kept += max(put_by, min(first * theirs.price, share))
            elif is_early:
                kept += put_by
        return kept
