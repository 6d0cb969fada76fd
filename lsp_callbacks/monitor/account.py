"""What measurements cost in gradients, and what may be spent on them: prices, rates, and what there is at a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

#: What a second measurement costs over the first, until its price is found out: it starts from the first.
SECOND = 0.5
#: Steps of training whose cost may be spent before any was saved: on one measurement of everything, and on the first
#: ones of the headline number.
ADVANCE = 15.0
#: Readings of the headline number that are put by at most; what comes then is free.
FULL = 2.0
#: Share of the headline number in the advance, and at most at each step where it takes what others need.
HEADLINE = 0.64
#: Steps between two measurements, for which the budget pays before anything else: of the headline number, and others.
SLOWEST, ROUND = 29, 250
#: Steps of the others' rates that a first measurement is waited for, before which none of them is measured again.
PATIENCE = 500
#: Part of the rates of others that goes to the headline number near the edge.
TAKEN = 0.5
#: Steps of training whose cost may be spent, beside the budget, on readings that a cap wants; it comes back as the
#: budget does.
CREDIT = 60.0
#: Errors of rounding that are let pass, in gradients.
ROUNDING = 1e-7


def union(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what measurements of one step spend gradients on: what several of them spend on the same counts once."""
    shared: dict[str, float] = {}
    for measurement in parts:
        for part, gradients in measurement.items():
            shared[part] = max(shared.get(part, 0.0), gradients)
    return shared


@dataclass
class Pace:
    """The measurements of one quantity so far, and the price of the next.

    Args:
        weight: how fast the quantity moves, beside the weights of the others.
        length: steps that a measurement takes.
        every_n_steps: start one every so many steps; None keeps to the budget.

    Attributes:
        parts: gradients that a measurement costs, by what they are spent on; None before they are known.
        first, started: steps of the first and of the last measurement that was started; None before it.
        count: measurements that were started.
        is_promised: whether the advance pays the first measurement.
        is_stale: whether the price may be another one now.
        postponed: the step from which on it need not wait any more; None where it does not wait.
        is_cold: whether the price is that of the first measurement.
    """

    weight: float = 1.0
    length: int = 1
    every_n_steps: int | None = None
    parts: dict[str, float] | None = None
    first: int | None = None
    started: int | None = None
    count: int = 0
    is_promised: bool = False
    is_stale: bool = False
    postponed: int | None = None
    is_cold: bool = False

    @property
    def price(self) -> float:
        """Gradients of a measurement by itself; 0 before they are known."""
        return sum((self.parts or {}).values())

    def price_beside(self, parts: Mapping[str, float]) -> float:
        """Return what a measurement costs in a step that spends gradients on these parts already."""
        return self.warmth * sum(max(0.0, price - parts.get(part, 0.0)) for part, price in (self.parts or {}).items())

    @property
    def warmth(self) -> float:
        """What the next measurement is expected to cost over the known price: that of a second one comes later."""
        return SECOND if self.is_cold and self.count else 1.0

    @property
    def doubling(self) -> int:
        """Steps to the next of the first readings, which are at 0, 1, 2, 4, 8, ... from the first one on."""
        return 1 if self.first is None or self.started is None else max(1, self.started - self.first)

    def early(self, period: float) -> int:
        """Return how many first readings, at doubling distances of less than a period, are still to come."""
        done = -1 if self.first is None or self.started is None else self.started - self.first
        most = max(0, math.ceil(math.log2(period))) if period > 0 else 0
        return sum(done < offset < period for offset in (0, *(2**k for k in range(most + 1))))

    def wants_price(self) -> bool:
        """Return whether the price is to be found out: before measurement number 1, 2, 3, 5, 9, 17, ...

        A second measurement starts from the first and is cheaper, and what is learnt later may change it again.
        """
        return self.parts is None or self.is_stale or self.count & (self.count - 1) == 0

    def start(self, step: int) -> None:
        """Count a measurement that starts at this step."""
        self.first = step if self.first is None else self.first
        self.started, self.postponed, self.count = step, None, self.count + 1

    def state_dict(self) -> list[Any]:
        """Return what was measured, without the settings, as a list: it is short in a checkpoint."""
        return [getattr(self, field.name) for field in fields(self)[3:]]

    def load_state_dict(self, state: list[Any]) -> None:
        """Continue from a state, with the settings of this one."""
        for field, value in zip(fields(self)[3:], state, strict=True):
            setattr(self, field.name, value)
        self.parts = None if self.parts is None else dict(self.parts)


def rates(
    paces: Mapping[str, Pace], income: float, headline: str | None, near: float, *, step_cost: float = 1.0
) -> dict[str, float]:
    """Return the gradients that each quantity without a fixed pace may spend at each step; a period is price over rate.

    Far from the edge one measurement of the headline number in ``1 / budget`` steps is enough. Of that it gets what is
    left where each of the others is measured once in `ROUND` steps, and at least one measurement in `SLOWEST` steps, as
    far as its share pays for that. What nobody needs is shared out among the others in proportion to ``sqrt(weight *
    price)``: of all paces that cost the same these have the least sum of ``weight * period``. Where one measurement in
    `ROUND` steps is too much, all of them wait equally long. A price is the `fair_price`.

    Args:
        paces: of all quantities that are measured, by name.
        income: gradients at each step, for all of them.
        headline: name of the quantity that comes first.
        near: a `nearness`: part of what the others have goes to the headline number.
        step_cost: gradients that a step of training takes.
    """
    prices = {
        name: fair_price(name, paces, headline) * (1.0 if p.count or name == headline else SECOND)
        for name, p in paces.items()
        if p.every_n_steps is None
    }
    share = prices.pop(headline, 0.0) if headline is not None else 0.0
    needs = {name: (price or 1.0) / ROUND for name, price in prices.items()}
    least, whole = sum(needs.values()), 0.0
    if headline is not None:
        most = HEADLINE * income if needs else income
        whole = min(share * income / step_cost, max(min(share / SLOWEST, most), income - least)) if share else most
    free = income - whole
    roots = {name: math.sqrt(paces[name].weight * (price or 1.0)) for name, price in prices.items()}
    more, total = max(0.0, free - least), sum(roots.values())
    rest = {name: need * min(1.0, free / least) + more * roots[name] / total for name, need in needs.items()}
    if headline is None:
        return rest
    taken = near * (TAKEN if rest else 1.0)
    return {name: (1 - taken) * rate for name, rate in rest.items()} | {headline: whole + taken * free}


def awaited(paces: Mapping[str, Pace], names: Iterable[str], rate: float) -> float:
    """Return what the dearest first measurement costs that a rate pays within `PATIENCE` steps; 0 without one."""
    prices = [paces[name].price for name in names if not paces[name].count]
    return max((price for price in prices if price <= PATIENCE * rate), default=0.0)


def fair_price(name: str, paces: Mapping[str, Pace], headline: str | None) -> float:
    """Return what the next measurement of a quantity costs, where it pays its share of what others spend on the same.

    Such quantities are measured at the same steps, so that each would otherwise save for what the others pay. The
    headline number keeps a pace of its own, and so do quantities of a fixed pace.
    """
    pace = paces[name]
    if name == headline or pace.every_n_steps is not None:
        return pace.warmth * pace.price
    others = [p.parts or {} for other, p in paces.items() if other != headline and p.every_n_steps is None]
    parts = pace.parts or {}
    return pace.warmth * sum(price / sum(part in other for other in others) for part, price in parts.items())


class Balance:
    """What there is in the account at one step, while the measurements of this step are chosen.

    Attributes:
        saved: gradients that are put by for the headline number.
        free: all others.
        chosen: names of the measurements.
        parts: what they spend gradients on.
    """

    def __init__(self, saved: float, free: float):
        self.saved, self.free = saved, free
        self.chosen: list[str] = []
        self.parts: dict[str, float] = {}

    def pay(self, name: str, pace: Pace, *, is_headline: bool, is_lent: bool = False) -> float:
        """Choose a measurement, and return what it costs beside the others; nothing if it is paid on credit."""
        self.chosen.append(name)
        if pace.every_n_steps is not None:
            return 0.0
        price = 0.0 if is_lent else pace.price_beside(self.parts)
        saved = min(self.saved, price) if is_headline else 0.0
        self.saved, self.free = self.saved - saved, self.free - (price - saved)
        self.parts = union((self.parts, pace.parts or {}))
        return price


class Account:
    """The gradients that may be spent: part of them is put by for the headline number, the rest is free.

    It begins with an *advance*, and each step adds the share ``budget`` of its own cost:

        ``left = income * (steps since the first measurement) + advance - spent = saved + free``

    What is paid on credit adds to the advance. Nothing of this ever becomes negative, so no more is spent than was
    there. Nobody else touches what is put by, at a rate of its own, for the headline number: it holds the price after
    price over rate steps. All of this follows in closed form, so that nothing has to be done at a step at which nothing
    is spent.

    Args:
        paces: of the quantities, by name; those of a fixed pace have no part in it.
        budget: income of a step over its cost.

    Attributes:
        origin: step of the first measurement; None before it.
        advance, spent: gradients.
        step_cost: gradients that a whole step of training takes: one, and more on a small network.
        headline: name of the quantity that comes first; None without one.
        near: nearness to the edge of stability.
        rates: gradients that each quantity may spend at each step.
        wanted: step from which on a reading of the headline number is wanted, once, beside the budget; the credit of
            `CREDIT` steps that pays for it comes back as the budget does. Infinite where none is.
    """

    def __init__(self, paces: Mapping[str, Pace], budget: float):
        self.paces, self.budget = paces, budget
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.origin: int | None = None
        self.advance, self.spent, self.step_cost, self.near = ADVANCE, 0.0, 1.0, 0.0
        self.headline: str | None = None
        self.rates: dict[str, float] = {}
        self._saved, self._settled = 0.0, 0
        self.wanted = math.inf
        self._lent, self._lent_step = 0.0, 0

    def credit(self, step: int) -> float:
        """Return the gradients that readings of the headline number that are wanted may take beside the budget."""
        return self.step_cost * CREDIT - max(0.0, self._lent - self.income * (step - self._lent_step))

    def is_lent(self, name: str, step: int) -> bool:
        """Return whether a reading of the headline number is wanted at this step, and the credit pays for it."""
        pace = self.paces[name]
        is_wanted = name == self.headline and step >= self.wanted > (-1 if pace.started is None else pace.started)
        return is_wanted and pace.price_beside({}) <= self.credit(step)

    @property
    def income(self) -> float:
        """Gradients that each step adds."""
        return self.budget * self.step_cost

    @property
    def saving(self) -> float:
        """Those of them that are put by for the headline number."""
        return 0.0 if self.headline is None else self.rates[self.headline]

    def left(self, step: int) -> float:
        """Return the gradients that may be spent at a step."""
        return self.income * (step - (step if self.origin is None else self.origin)) + self.advance - self.spent

    def balance(self, step: int) -> Balance:
        """Return what there is at a step."""
        left, saved = self.left(step), 0.0
        if self.headline is not None:
            passed = 0 if self.origin is None else max(0, step - self._settled)
            most = max(self._saved, FULL * self.paces[self.headline].price)
            saved = max(0.0, min(self._saved + self.saving * passed, most, left))
        return Balance(saved, left - saved)

    def reserve(self) -> float:
        """Return what others must leave free: the first readings of the headline number, as long as they come.

        As long as its price is not known (under Adam it waits for a second gradient), its share of the advance.
        """
        if self.headline is None:
            return 0.0
        pace = self.paces[self.headline]
        if pace.parts is None:
            return self.advance * HEADLINE
        readings = pace.early(self.period(self.headline))
        return max(0.0, min(readings * pace.price, self.advance * HEADLINE - pace.count * pace.price))

    def period(self, name: str) -> float:
        """Return the steps in which the budget pays for a measurement."""
        return fair_price(name, self.paces, self.headline) / self.rates[name]

    def first(self) -> float:
        """Return what measurements that are not the first of their quantity leave free for those that are."""
        others = [name for name in self.rates if name != self.headline]
        return awaited(self.paces, others, self.income - self.saving)

    def round(self) -> float:
        """Return what one measurement of all others costs."""
        return sum(union(self.paces[name].parts or {} for name in self.rates if name != self.headline).values())

    def begin(self, step: int) -> None:
        """Begin with the first step that can be measured."""
        self.origin = self._settled = step

    def settle(self, step: int) -> None:
        """Write down what there is at a step, before rates or prices become others."""
        if self.headline in self.paces:
            self._saved = self.balance(step).saved
        self._settled = max(self._settled, step)

    def share_out(self, headline: str | None, near: float) -> None:
        """Compute the rates anew."""
        leader = None if headline is None else self.paces.get(headline)
        self.headline = None if leader is None or leader.every_n_steps is not None else headline
        self.near = near
        self.rates = rates(self.paces, self.income, self.headline, near, step_cost=self.step_cost)

    def pay(self, step: int, names: list[str]) -> None:
        """Start measurements at a step, and charge them; what several of them spend on the same counts once."""
        self.settle(step)
        balance = self.balance(step)
        for name in names:
            pace, is_lent = self.paces[name], self.is_lent(name, step)
            price = pace.price_beside({}) if is_lent else 0.0
            if is_lent:
                self._lent, self._lent_step = self.step_cost * CREDIT - self.credit(step) + price, step
                self.advance += price
            self.spent += price + balance.pay(name, pace, is_headline=name == self.headline, is_lent=is_lent)
            pace.start(step)
        self._saved = balance.saved
        self.settle(step)
        self.share_out(self.headline, self.near)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers only."""
        return {
            "origin": self.origin, "spent": self.spent, "advance": self.advance, "step_cost": self.step_cost,
            "near": self.near, "saved": self._saved, "settled": self._settled,
            "wanted": self.wanted, "lent": self._lent, "lent_step": self._lent_step,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.origin, self.spent, self.advance = state["origin"], state["spent"], state["advance"]
        self.step_cost, self.near = state["step_cost"], state["near"]
        self._saved, self._settled = state["saved"], state["settled"]
        self.wanted, self._lent, self._lent_step = state["wanted"], state["lent"], state["lent_step"]
