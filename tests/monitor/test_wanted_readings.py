"""Readings of the headline number that are wanted: at their step, on a credit of their own, beside the budget."""

import math
from itertools import pairwise

import pytest
from test_cadence import Dial, starts

from lsp_callbacks import Monitor
from lsp_callbacks.monitor.account import CREDIT


def run(wanted, steps=400, price=1.0, budget=0.05):
    """Steps of readings far from the edge, of which each is wanted so many steps after the one before."""
    monitor = Monitor(Dial(lambda step: 0.1, cost=price), budget=budget)
    found, cadence = [], monitor.cadence
    for step in range(steps):
        now = starts(monitor, 1, begin=step)
        found += now
        if now:
            cadence.want(step + wanted if wanted else math.inf)
    return found, cadence


def test_none_is_wanted_by_itself():
    plain, cadence = run(None)
    assert cadence.account.wanted == math.inf and cadence.account.credit(400) == CREDIT * cadence.account.step_cost
    assert len(plain) < 30


def test_each_comes_at_its_step_until_the_credit_is_spent():
    found, cadence = run(3, steps=60, price=2.0)
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps) <= 3 and cadence.account.credit(60) < CREDIT * cadence.account.step_cost


def test_the_credit_is_limited_and_comes_back_as_the_budget_does():
    budget, price, steps = 0.05, 2.0, 3000
    plain, _ = run(None, steps=steps, price=price, budget=budget)
    found, cadence = run(1, steps=steps, price=price, budget=budget)
    account = cadence.account
    allowance = account.step_cost * (CREDIT + budget * steps)
    assert account.credit(steps) >= 0 and account.left(steps) >= -1e-9
    more = price * (len(found) - len(plain))
    assert 0.3 * allowance <= more <= allowance + price
    first = next(k for k, (a, b) in enumerate(pairwise(found)) if b - a > 1)
    assert first >= CREDIT / price - 2  # one at each step at first
    assert account.credit(steps) < account.credit(steps + 400) <= CREDIT * account.step_cost


def test_what_is_wanted_and_lent_goes_on_from_a_checkpoint():
    _, cadence = run(2, steps=50)
    state = cadence.account.state_dict()
    _, other = run(None, steps=5)
    other.account.load_state_dict(state)
    assert other.account.wanted == cadence.account.wanted < math.inf
    assert other.account.credit(60) == pytest.approx(cadence.account.credit(60))
    assert cadence.account.credit(60) < CREDIT * cadence.account.step_cost
