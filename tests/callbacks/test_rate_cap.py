"""Caps from critical rates: what they lower, and to what."""

import math

import pytest
import torch

from lsp_callbacks.callbacks.lr_forecast import CriticalRate
from lsp_callbacks.monitor.critical_rate import critical_rate
from lsp_callbacks.monitor.rate_cap import RateCap
from lsp_callbacks.monitor.rates_of_update import RatesOfUpdate


def read(*criticals, safety=0.5, max_age=10, relative=(1.0,), **settings):
    cap = RateCap(safety, max_age)
    for step, critical in enumerate(criticals):
        cap.add(step, critical=critical, relative=relative, **{"is_falling": True} | settings)
    return cap


@pytest.mark.parametrize("settings", [{"is_falling": False}, {"has_risen": True}])
def test_the_lowest_of_three_readings_counts_so_that_a_fall_is_followed_at_once(settings):
    def limits(*criticals):
        return read(*criticals, **settings).limits

    assert limits(2.0) == [1.0] and limits(2.0, 1.0) == limits(1.0, 2.0, 4.0) == [0.5]
    assert limits(1.0, 3.0, 4.0, 5.0) == [1.5]
    assert limits(16.0, 9.0, 0.8, 0.3) == [0.15] and limits(math.inf, 1.0) == [0.5]
    assert limits(1.0, math.inf, math.inf) == [0.5] and limits(math.inf) == [math.inf]


def test_while_the_loss_falls_the_middle_one_of_three_counts_so_that_one_alone_lowers_nothing():
    assert read(2.0).limits == [1.0] and read(2.0, 1.0).limits == [0.5]
    assert read(2.0, 3.0, 0.1).limits == read(2.0, 0.1, 3.0).limits == [1.0]
    assert read(2.0, 3.0, 0.1, 0.2).limits == [0.1]  # the second follows
    assert read(2.0, math.inf, math.inf).limits == [math.inf]
    cap = read(2.0, 3.0, relative=(1.0, 0.5))
    cap.add(2, critical=0.1, relative=[1.0, 0.5], has_risen=True)
    assert cap.limits == pytest.approx([0.05, 0.025])


def test_the_critical_rate_of_an_observation_is_that_of_the_number_that_counts():
    def observed(**values):
        return {f"stability/{key}": value for key, value in values.items()}

    mean_square = observed(courant=0.5, courant_mean_square=0.5, mean_square_lr=3.0, courant_gd=0.1)
    assert critical_rate(mean_square, used=1.0) == 3.0
    assert critical_rate(mean_square, used=1.0, key="stability/courant_gd") == 10.0
    assert critical_rate(observed(courant=0.5, courant_gd=0.5), used=1.0) == 2.0
    assert critical_rate(observed(courant=0.0, courant_gd=0.0), used=1.0) == math.inf
    assert math.isnan(critical_rate(observed(courant=math.nan), used=1.0)) and math.isnan(critical_rate({}, used=1.0))
    rate = CriticalRate()
    assert rate.add(mean_square, used=1.0) and rate.mean == 3.0
    assert rate.add(observed(courant=0.5, courant_sgd=0.5, critical_lr=7.0), used=1.0) and rate.mean == 7.0
    assert not rate.add(mean_square, used=1.0)  # not of SGD itself


def test_before_a_reading_and_below_the_cap_nothing_changes():
    assert read().factor([1e9], step=0) == 1.0
    assert read(2.0).factor([1.0], step=1) == 1.0 and read(2.0).factor([4.0], step=1) == 0.25
    assert read(math.inf).factor([1e9], step=1) == 1.0


def test_no_cap_begins_with_an_old_reading_and_one_that_holds_goes_on():
    cap = read(2.0)
    assert cap.factor([2.0], step=10) == 0.5 and cap.factor([2.0], step=11) == 1.0
    cap.is_on = True
    assert cap.factor([2.0], step=11) == 0.5


def test_a_reading_that_is_not_trusted_only_lowers():
    cap = read(2.0)
    cap.add(1, critical=8.0, relative=[1.0], only_lower=True)
    assert cap.limits == [1.0] and cap.step == 1
    cap.add(2, critical=1.0, relative=[1.0], only_lower=True, has_risen=True)
    assert cap.limits == [0.5] and cap.step == 2
    assert read(8.0, only_lower=True).limits == [4.0]  # nothing to compare with


def test_one_factor_for_all_groups_by_the_one_that_is_furthest_above():
    cap = read(1.0, relative=(1.0, 0.1))
    assert cap.limits == [0.5, 0.05]
    assert cap.factor([1.0, 0.1], step=1) == pytest.approx(0.5)
    assert cap.factor([0.5, 0.2], step=1) == pytest.approx(0.25)  # the ratio has changed
    assert cap.largest([0.5, 0.2]) == pytest.approx(0.125)
    assert read(1.0, relative=(1.0, 0.0)).factor([0.5, 9.0], step=1) == 1.0  # which had no rate


def test_smaller_rates_of_groups_are_no_less_stable():
    """By the eigenvalues of ``R H`` for random curvatures and ratios: the rule for ratios that have changed."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        factor = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        curvature, old, new = factor @ factor.T, *torch.rand(2, 4, generator=generator, dtype=torch.float64)
        critical = 2 / torch.linalg.eigvals(torch.diag(old / old.max()) @ curvature).real.max()
        cap = read(float(critical), safety=0.9, relative=(old / old.max()).tolist())
        applied = 100 * new * cap.factor((100 * new).tolist(), step=1)
        assert torch.linalg.eigvals(torch.diag(applied) @ curvature).real.max() / 2 <= 0.9 + 1e-9


def test_groups_that_join_begin_anew():
    cap = read(1.0, 1.0)
    cap.add(2, critical=4.0, relative=[1.0, 0.5])
    assert cap.limits == [2.0, 1.0]


def test_the_state_goes_on():
    cap, other = read(1.0, 3.0, is_falling=False), RateCap(0.5, 10)
    cap.is_on = True
    other.load_state_dict(cap.state_dict())
    for each in (cap, other):
        each.add(5, critical=3.0, relative=[1.0])
    assert other.limits == cap.limits == [0.5] and other.is_on and other.step == 5


def groups(*rates, kind=torch.optim.SGD, **settings):
    return kind([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates], **settings)


def test_rates_hold_for_one_step_and_are_the_same_objects_after():
    optimizer, lowered = groups(1, 0.3), RatesOfUpdate()
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    before = [group["lr"] for group in optimizer.param_groups]
    lowered.multiply(optimizer, 0.5)
    optimizer.step()
    optimizer.step()
    assert used == [[0.5, 0.15], [1, 0.3]]
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, before))
    lowered.multiply(optimizer, 0.5)
    lowered.multiply(optimizer, 0.5)  # a step that was not made
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.15]
    lowered.close()
    assert [group["lr"] for group in optimizer.param_groups] == before


def test_a_tensor_stays_the_same_tensor_even_if_groups_share_it():
    rate = torch.tensor(0.3)
    optimizer, lowered, used = groups(rate, rate, kind=torch.optim.Adam, foreach=False), RatesOfUpdate(), []
    optimizer.register_step_pre_hook(lambda o, *_: used.extend(float(g["lr"]) for g in o.param_groups))
    lowered.multiply(optimizer, 0.5)
    optimizer.step()
    assert used == pytest.approx([0.15, 0.15])
    assert all(group["lr"] is rate for group in optimizer.param_groups) and rate == torch.tensor(0.3)


def test_what_somebody_else_sets_stays():
    optimizer, lowered = groups(1.0), RatesOfUpdate()
    optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=7.0))
    lowered.multiply(optimizer, 0.5)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 7.0
