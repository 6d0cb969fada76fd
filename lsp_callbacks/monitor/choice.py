"""Which measurements start at one step, and at which step the next ones can."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping

from lsp_callbacks.monitor.account import ROUNDING, Account, Balance, Pace

#: By how much shorter the gaps of the headline number are near the edge, as long as gradients are free.
SAVED = 2.0
#: By how much shorter the gaps of the others are as long as so many rounds of them are free.
HASTE, AMPLE = 2.0, 0.75
#: What costs at most so many times as much as a part of it brings that part.
LITTLE = 2.0


class Choice:
    """Chooses the measurements that start, as far as the account allows it; for the rules see `Cadence`.

    Args:
        paces: of all quantities that are measured, by name.
        account: of the gradients.
    """

    def __init__(self, paces: Mapping[str, Pace], account: Account):
        self.paces, self.account = paces, account

    def make(
        self, step: int, *, busy: Collection[str] = (), missed: Collection[str] = ()
    ) -> tuple[tuple[str, ...], float]:
        """Return the names of what starts at a step, and the next step at which anything does if nothing starts now.

        Args:
            step: number of the optimizer step.
            busy: quantities whose measurement is under way.
            missed: those of a fixed pace that should have started at a step that was not taken.
        """
        account = self.account
        queue, balance = self._queue(step), account.balance(step)
        haste = HASTE if balance.free >= AMPLE * account.round() else 1.0
        for _ in range(2):  # what starts makes others cheaper
            awaited: list[str] = []  # those that are overdue and cannot be paid yet
            for name in queue:
                if name in balance.chosen or name in busy or self._waits_for(name, awaited):
                    continue
                pace = self.paces[name]
                is_missed = name in missed and pace.every_n_steps is not None and pace.postponed is None
                if is_missed or self._starts(name, step, balance, haste):
                    is_headline, is_lent = name == account.headline, account.is_lent(name, step)
                    balance.pay(name, pace, is_headline=is_headline, is_lent=is_lent)
                elif self._is_overdue(name, step):
                    haste = 1.0  # what is free is for those who wait for it
                    awaited.append(name)
        if balance.chosen:
            return tuple(balance.chosen), math.inf
        # What is free may become ample before.
        return (), min((self._at(name, step + 1, HASTE) for name in queue), default=math.inf)

    def _waits_for(self, name: str, awaited: Collection[str]) -> bool:
        """Return whether a measurement comes for nothing beside an overdue one, and so waits until that is paid."""
        return any(self._brings(other, name) for other in awaited)

    def _brings(self, name: str, other: str) -> bool:
        """Return whether a measurement spends gradients on all that another one does, and on little else."""
        pace, lesser = self.paces[name], self.paces[other]
        if not pace.parts or not lesser.parts or pace.every_n_steps is not None or lesser.every_n_steps is not None:
            return False
        return lesser.parts.keys() <= pace.parts.keys() and pace.price <= LITTLE * lesser.price

    def _queue(self, step: int) -> list[str]:
        """Return all names: the headline number, those never measured, and the others, which take turns.

        Of those never measured the cheapest comes first, and before it whatever `_brings` it.
        """
        account = self.account

        def turn(name: str) -> tuple[bool, float, float, float]:
            pace = self.paces[name]
            waited = math.inf
            if name in account.rates and pace.started is not None and pace.parts is not None:
                waited = (step - pace.started) / max(1.0, account.period(name))
            brought = [self.paces[other].price for other in self.paces if self._brings(name, other)]
            return name != account.headline, -waited, min(brought, default=pace.price), -pace.price

        return sorted(self.paces, key=turn)

    def _is_overdue(self, name: str, step: int) -> bool:
        """Return whether the last measurement is a period ago, or there is none."""
        pace = self.paces[name]
        if pace.every_n_steps is not None or pace.parts is None or name == self.account.headline:
            return False
        return pace.started is None or step - pace.started >= self.account.period(name)

    def _starts(self, name: str, step: int, balance: Balance, haste: float) -> bool:
        """Return whether a measurement starts beside those that were chosen."""
        pace, headline = self.paces[name], self.account.headline
        if pace.every_n_steps is not None or pace.parts is None:
            return step >= self._at(name, step, haste)
        if pace.postponed is not None:
            is_due = step >= pace.postponed
        elif self._is_led(name) and headline not in balance.chosen:
            is_due = False
        else:
            is_due = pace.started is None or step >= self._earliest(name, haste, balance)
        return is_due and self._missing(name, step, balance) <= ROUNDING

    def _at(self, name: str, step: int, haste: float) -> float:
        """Return the first step from this one on at which a measurement starts by itself, if nothing changes before."""
        pace, account = self.paces[name], self.account
        if pace.postponed is not None:
            step = max(step, pace.postponed)
        elif pace.every_n_steps is not None:
            origin, every = account.origin, pace.every_n_steps
            return step if origin is None else origin + every * math.ceil((step - origin) / every)
        elif self._is_led(name):
            return math.inf
        elif pace.started is not None:
            step = max(step, self._earliest(name, haste))
        if pace.every_n_steps is not None or pace.parts is None:
            return step
        # What there is grows with the steps, by this at least; it is a line with kinks.
        growth = account.saving if name == account.headline else account.income - account.saving
        missing = self._missing(name, step, account.balance(step))
        steps = range(step, step + math.ceil(max(0.0, missing) / growth))
        return step + bisect_left(
            steps, True, key=lambda later: self._missing(name, later, account.balance(later)) <= ROUNDING
        )

    def _is_led(self, name: str) -> bool:
        """Return whether a measurement starts only beside one of the headline number, which comes more often."""
        account = self.account
        if account.headline is None or name == account.headline:
            return False
        leader = self.paces[account.headline]
        if leader.started is None or leader.postponed is not None:
            return False
        return account.period(account.headline) <= account.period(name)

    def _earliest(self, name: str, haste: float, balance: Balance | None = None) -> int:
        """Return the step before which a measurement does not start again, whatever there is in the account."""
        pace, account = self.paces[name], self.account
        beside = pace.price_beside({} if balance is None else balance.parts)
        gap = min(beside / account.rates[name], account.period(name))
        if name == account.headline:
            gap = min(gap / (1 + SAVED * account.near), pace.doubling)
        else:
            gap /= haste
            if account.headline is None and haste > 1:
                gap = min(gap, pace.doubling)
        earliest = (pace.started or 0) + max(pace.length, math.ceil(gap - ROUNDING))
        if name == account.headline and account.wanted > (pace.started or 0):
            return int(min(earliest, account.wanted))
        return earliest

    def _missing(self, name: str, step: int, balance: Balance) -> float:
        """Return the gradients that a quantity needs beside what it may take."""
        pace, account = self.paces[name], self.account
        price = pace.price_beside(balance.parts)
        if account.is_lent(name, step):
            return 0.0
        if name == account.headline:
            is_early = pace.started is not None and step - pace.started < min(account.period(name), pace.doubling)
            return price - balance.saved - (max(0.0, balance.free - account.round()) if is_early else balance.free)
        is_paid_now = pace.is_promised if pace.started is None else step - pace.started >= account.period(name)
        kept = 0.0 if is_paid_now else account.reserve()
        return price - balance.free + max(kept, account.first() if pace.count else 0.0)
