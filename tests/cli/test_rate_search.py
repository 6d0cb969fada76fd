"""The search for a rate, on runs whose critical rate is a formula."""

import math

import pytest

from lsp_callbacks import Unmeasurable
from lsp_callbacks.cli.rate_search import RateSearch, TrialRun


def search(critical, first, *, explodes=math.inf, loss=None, error=0.0):
    """Search where a run at a rate has that critical rate, and fails above ``explodes``."""
    found = RateSearch(first)
    while (rate := found.next_rate()) is not None:
        failure = "exploded" if rate > explodes else ""
        end = 1.0 / (1 + rate) if loss is None else loss(rate)
        found.add(TrialRun(rate, 100, rate / critical(rate), error, 2.0, end, failure))
    return found


def test_constant_curvature_is_exact():
    found = search(lambda rate: 0.5, first=0.5)
    rate = found.estimate()
    assert (rate.low, rate.value, rate.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)
    assert [run.rate for run in found.runs] == pytest.approx([0.5, 0.125, 0.5])


@pytest.mark.parametrize("power", [0.0, 0.3, 0.6, 0.75])
@pytest.mark.parametrize("first", [30.0, 0.01])
def test_the_fixed_point_is_found_from_above_and_from_below(power, first):
    """c(eta) = 0.4 (eta / 0.4)^power has its fixed point at 0.4."""
    found = search(lambda rate: 0.4 * (rate / 0.4) ** power, first=first)
    rate = found.estimate()
    assert rate.value == pytest.approx(0.4, rel=0.12) and rate.low <= rate.value <= rate.high
    assert found.runs[-1].rate == pytest.approx(rate.value, rel=0.1)


def test_where_runs_explode_below_the_critical_rate_that_is_the_limit():
    rate = search(lambda rate: 1.0, first=8.0, explodes=0.3).estimate()
    assert 0.15 <= rate.low <= rate.value <= 0.3 <= rate.high <= 0.6


def test_a_network_that_is_stuck_is_not_taken_for_a_stable_one():
    """Above 0.2 it has no curvature any more, and its loss stays where it was."""
    found = search(lambda rate: 3.0 if rate > 0.2 else 0.1, first=0.7, loss=lambda rate: 1.9 if rate > 0.2 else 1.0)
    assert found.estimate().value == pytest.approx(0.1, rel=0.2)


def test_noise_is_in_the_interval():
    narrow, wide = (search(lambda rate: 0.5, first=0.5, error=error).estimate() for error in (0.01, 0.2))
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    assert wide.high / wide.low == pytest.approx(math.exp(0.8))


def test_what_was_not_measured_is_not_stable():
    run = TrialRun(0.1, 100, math.nan, 0.0, 2.0, 1.0)
    found = RateSearch(1.0)
    found.add(run)
    assert found.is_beyond(run) and found.below is None and found.next_rate() == 0.05


def test_refuses_where_no_run_is_stable_and_where_none_is_unstable():
    with pytest.raises(Unmeasurable, match=r"no run of 16 was stable.*steps"):
        search(lambda rate: 1.0, first=1.0, explodes=0.0)
    with pytest.raises(Unmeasurable, match="no learning rate is unstable"):
        search(lambda rate: math.inf, first=1.0)
