"""A cap falls at once and rises step by step; before the loss has fallen it begins low, and what trains is trusted."""

import math

import pytest

from lsp_callbacks.monitor.rate_cap import CONFIRMED, EARLY, GROWTH, START, TOLERANCE, RateCap


def apply(cap, rate, step):
    """The rate of one update at this scheduled rate, as the callback applies it."""
    factor = cap.factor([rate], step=step)
    cap.is_on = factor < 1
    cap.note(step, [rate * factor])
    return rate * factor


def test_a_capped_rate_grows_by_three_per_cent_and_thirty_beyond_the_last_reading():
    cap = RateCap(1.0, 1000)
    assert apply(cap, 0.1, 0) == 0.1
    cap.add(0, critical=1.0, relative=[1.0], used=[0.1], is_falling=True)
    rates = [apply(cap, 60.0, step) for step in range(1, 40)]  # a jump
    assert rates[:3] == pytest.approx([0.1 * GROWTH**k for k in (1, 2, 3)])
    assert max(rates) == rates[-1] == pytest.approx(0.1 * CONFIRMED)  # until a reading confirms it
    cap.add(39, critical=1.0, relative=[1.0], used=[rates[-1]], is_falling=True)
    assert apply(cap, 60.0, 40) == pytest.approx(0.1 * CONFIRMED * GROWTH)
    cap.add(40, critical=0.05, relative=[1.0], used=[0.13])
    assert cap.limits == [1.0]  # one of three
    cap.add(41, critical=0.05, relative=[1.0], used=[0.13], has_risen=True)  # a fall is followed at once
    assert apply(cap, 60.0, 42) == pytest.approx(0.05)
    assert apply(cap, 0.04, 43) == 0.04 and not cap.is_on  # the schedule's own


def test_it_grows_to_the_schedule_and_is_off():
    cap = RateCap(1.0, 1000)
    cap.add(0, critical=0.5, relative=[1.0], is_falling=True)
    assert apply(cap, 1.0, 1) == 0.5
    for step in (1, 2, 3):
        cap.add(step, critical=9.0, relative=[1.0], used=[0.5])
    rates = [apply(cap, 1.0, step) for step in range(2, 40)]
    cap.add(39, critical=9.0, relative=[1.0], used=[rates[-1]])
    rates += [apply(cap, 1.0, step) for step in range(40, 80)]
    cap.add(79, critical=9.0, relative=[1.0], used=[rates[-1]])
    rates += [apply(cap, 1.0, step) for step in range(80, 100)]
    assert rates[0] == pytest.approx(0.5 * GROWTH) and rates == sorted(rates) and rates[-1] == 1.0 and not cap.is_on


def test_before_the_loss_has_fallen_it_begins_at_a_tenth_of_the_cap():
    def first(rate, *, began=None, proven=False):
        cap = RateCap(0.5, 1000)
        apply(cap, rate if began is None else began, 0)
        cap.add(0, critical=2.0, relative=[1.0], used=[rate], is_falling=proven)
        return apply(cap, rate, 1)

    assert first(5.0) == pytest.approx(START) == first(1.01 / EARLY)
    assert first(0.99 / EARLY) == 0.99 / EARLY  # far below
    assert first(0.9, proven=True) == 0.9
    # One that grows, as in a user's warm-up, is not set back; it grows no faster than by 3 %.
    assert first(0.9, began=0.8) == pytest.approx(0.8 * GROWTH) and first(0.9, began=0.89) == 0.9


def test_a_rate_at_which_the_loss_fell_is_trusted_until_the_loss_rises_above_the_edge():
    def read(critical, **settings):
        cap.add(cap.step + 1, critical=critical, relative=[1.0], used=[1.0], **settings)

    cap = RateCap(0.9, 1000)
    read(2.0, is_falling=True)
    assert cap.trusted == [1.0]
    read(0.2, is_falling=True)
    # The edge has come down to the rate: no danger. The rate has grown: danger.
    assert cap.factor([1.0], step=2) == cap.factor([TOLERANCE], step=2) == 1.0 and not cap.is_exceeded([1.0])
    assert cap.factor([1.2], step=2) == pytest.approx(0.18 / 1.2) and cap.is_exceeded([1.2])
    read(3.0, has_risen=True)  # not because of the rate
    assert cap.trusted == [1.0]
    read(0.2, has_risen=True)
    assert cap.trusted == [0.0] and cap.factor([1.0], step=4) == pytest.approx(0.18)
    cap = RateCap(0.9, 1000)
    read(1.1, is_falling=True)  # not below its cap
    read(2.0)  # the loss has not fallen
    read(2.0, is_falling=True, was_capped=True)
    assert cap.trusted == [0.0]
    read(0.1, is_falling=True)
    read(9.0, is_falling=True)  # the middle one of three decides
    assert cap.trusted == [1.0]


def test_a_run_that_was_capped_trusts_no_rate_but_the_schedules():
    cap, other = RateCap(1.0, 1000), RateCap(1.0, 1000)
    apply(cap, 0.5, 0)
    cap.add(0, critical=1.0, relative=[1.0], used=[0.5])
    assert apply(cap, 0.5, 1) == pytest.approx(START)  # of a rate below its cap
    for step in range(1, 80):
        assert cap.trusted == [0.0]
        other.load_state_dict(cap.state_dict())  # nor after a checkpoint
        cap.add(step, critical=1.0, relative=[1.0], used=cap._used, was_capped=cap.is_on, is_falling=True)
        rate = apply(cap, 0.5, step + 1)
        if rate == 0.5:
            break
    assert 40 < step < 79 and not cap.is_on and cap.is_proven and cap.trusted == other.trusted == [0.0]
    for each, is_falling, was_capped in ((cap, True, False), (other, True, True)):
        each.add(81, critical=1.0, relative=[1.0], used=[0.5], was_capped=was_capped, is_falling=is_falling)
    assert cap.trusted == [0.5] and other.trusted == [0.0]
    for each in (cap, other):
        for step in (82, 83):
            each.add(step, critical=0.2, relative=[1.0], used=[0.5], was_capped=each is other, is_falling=True)
    assert apply(cap, 0.5, 84) == 0.5 and apply(other, 0.5, 84) == pytest.approx(0.2) and other.is_exceeded([0.5])


def test_readings_are_wanted_before_a_falling_critical_rate_comes_to_the_rate():
    cap = RateCap(1.0, 1000)
    assert cap.next_reading([1.0]) == math.inf
    cap.add(0, critical=16.0, relative=[1.0])
    assert cap.next_reading([1.0]) == 1
    cap.add(10, critical=16.0, relative=[1.0])
    assert cap.next_reading([1.0]) == math.inf  # it does not fall, and is far away
    assert cap.next_reading([9.0]) == 21  # near: after a gap that grows
    cap.add(20, critical=6.0, relative=[1.0])
    # By exp(-k log(16 / 6) / 10) it comes from 6 to 1 in 18.3 steps.
    assert cap.next_reading([1.0]) == 20 + int(0.5 * 10 * math.log(6) / math.log(16 / 6)) == 29
    assert cap.next_reading([6.0]) == 21
    cap.add(21, critical=8.0, relative=[1.0], used=[3.0], is_falling=True)
    assert cap.next_reading([3.0]) == math.inf  # trusted
    assert cap.next_reading([0.0]) == math.inf


def test_the_state_goes_on_in_growing():
    cap, other = RateCap(1.0, 10), RateCap(1.0, 10)
    apply(cap, 0.1, 0)
    cap.add(0, critical=1.0, relative=[1.0], used=[0.1], is_falling=True)
    apply(cap, 5.0, 1)
    other.load_state_dict(cap.state_dict())
    assert apply(other, 5.0, 2) == apply(cap, 5.0, 2) == pytest.approx(0.1 * GROWTH**2)
    assert other.trusted == [0.1] and other.is_proven and other.next_reading([5.0]) == cap.next_reading([5.0])
