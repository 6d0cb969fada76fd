"""When what is measured, what failures do, and what is remembered; without Lightning."""

import io
import math
import warnings
from itertools import pairwise

import pytest
import torch

from lsp_callbacks import Lyapunov, Monitor, Quantity, Sharpness, Snapshot, SpectralNorm, Unmeasurable
from lsp_callbacks.monitor.account import ROUND
from lsp_callbacks.monitor.budget import COUNTING
from lsp_callbacks.operators import cost

NET, X = torch.nn.Linear(1, 1, bias=False).double(), torch.tensor([[2.0]], dtype=torch.float64)


class Fake(Quantity):
    """Counts steps; fails where it is told to."""

    needs_update, key_states = True, False

    def __init__(self, name="fake", prepare=0, window=1, cost=None, fails=None, unfit=None):
        super().__init__()
        self.name, self.keys, self.prepare, self.window = name, (f"stability/{name}",), prepare, window
        self.costs, self.fails, self.unfit = cost or {name: 1.0}, fails or {}, unfit
        self.seen, self.under_way = [], 0
        self.add_state("total", default=torch.tensor(0.0), persistent=True)

    def check(self, snapshot):
        if self.unfit:
            raise Unmeasurable(self.unfit)

    def cost(self, snapshot):
        return self.costs

    def update(self, snapshot):
        self.complete = False
        self.seen.append(snapshot.step)
        if snapshot.step in self.fails:
            raise self.fails[snapshot.step]
        self.under_way += 1
        if self.under_way == self.prepare + self.window:
            self.total, self.under_way, self.complete = self.total + 1, 0, True

    def compute(self):
        return {f"stability/{self.name}": self.total, f"stability/{self.name}/layer": self.total}

    def vectors(self):
        return {"under_way": self.under_way} if self.under_way else {}

    def load_vectors(self, vectors):
        self.under_way = vectors.get("under_way", 0)


def snapshot(step, optimizer=None):
    return Snapshot(step, NET, replay=lambda: NET(X).square().mean(), optimizer=optimizer)


def run(monitor, steps, start=0):
    """Observes; says which steps the monitor asked for."""
    asked = []
    for step in range(start, start + steps):
        if monitor.wants(step):
            asked.append(step)
        monitor.observe(snapshot(step))
    return asked


# -- cadence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "every, prepare, window, start, seen, completed",
    [
        (1, 0, 1, 0, range(10), range(10)),
        (3, 0, 1, 0, [0, 3, 6, 9], [0, 3, 6, 9]),
        (3, 0, 1, 7, [7, 10, 13, 16], [7, 10, 13, 16]),  # from the first step there is
        (5, 1, 2, 0, [0, 1, 2, 5, 6, 7], [2, 7]),
        (1, 1, 2, 0, range(10), [2, 5, 8]),  # one window after the other
        (2, 1, 2, 0, [0, 1, 2, 4, 5, 6, 8, 9], [2, 6]),  # a start inside a window is passed over
    ],
)
def test_an_integer_is_obeyed(every, prepare, window, start, seen, completed):
    quantity = Fake(prepare=prepare, window=window)
    monitor = Monitor(quantity, every_n_steps=every)
    asked = run(monitor, 10, start)
    assert quantity.seen == asked == list(seen)
    assert monitor.history["stability/fake"].steps == list(completed)
    assert monitor.history["stability/fake"].values == [1.0 + i for i in range(len(completed))]


@pytest.fixture
def without_hooks(monkeypatch):
    """Prices without the hooks and copies of a measured step, which on so small a network are all of it."""
    monkeypatch.setattr(cost, "HOOKS", 0.0)


def test_the_hooks_of_a_measured_step_are_paid_for_once():
    monitor = Monitor(Fake("a", cost={"a": 1.0}), Fake("b", cost={"b": 1.0}))
    monitor.observe(snapshot(0))
    (hooks,) = {pace.parts["hooks and copies"] for pace in monitor.cadence.paces.values()}
    assert hooks == pytest.approx(cost.HOOKS / cost.gradient_time(snapshot(0)))
    assert monitor.cadence.account.spent == pytest.approx(COUNTING + 2.0 + hooks)


@pytest.mark.parametrize(
    "budget, quantities, periods",
    [
        (0.05, [Fake(cost={"a": 1.0})], [20]),
        (
            0.1,
            [Fake("a", cost={"forward": 0.4, "a": 1.0}), Fake("b", cost={"forward": 0.4, "b": 1.01})],
            [1.2, 1.21],  # each pays half of what they share
        ),
        (1.0, [Fake(cost={"a": 0.1}, prepare=3, window=4)], [7]),  # never shorter than the window
    ],
)
def test_a_budget_gives_periods(budget, quantities, periods, without_hooks):
    monitor = Monitor(*quantities, budget=budget)
    run(monitor, 60, start=2)
    found = [monitor.cadence.period(quantity.name) for quantity in quantities]
    step = monitor.budget.step
    if len(quantities) > 1:  # one measurement in so many steps each, and the rest by the roots of their prices
        rest = (budget * step - sum(periods) / ROUND) / sum(price**0.5 for price in periods)
        periods = [step * price / (price / ROUND + rest * price**0.5) for price in periods]
    assert found == pytest.approx([max(q.prepare + q.window, p / step) for q, p in zip(quantities, periods)])
    assert all(quantity.seen[0] == 2 for quantity in quantities)


def test_what_fails_costs_the_replay_that_finds_it_out(without_hooks):
    monitor = Monitor(SpectralNorm(), Sharpness(), budget=0.1)
    adam = torch.optim.NAdam(NET.parameters())
    with pytest.warns(UserWarning, match="sharpness at step 0.*depend on its gradient"):
        found = monitor.observe(snapshot(0, adam))
    paces = monitor.cadence.paces
    assert paces["sharpness"].price == 1.0 and found.failures.keys() == {"sharpness"}
    assert paces["spectral_norm"].price == pytest.approx(sum(SpectralNorm().cost(snapshot(0, adam)).values()))
    assert math.isfinite(found.values["stability/spectral_norm_max"])


# -- prices --------------------------------------------------------------------------------------------------------


class Dear(Fake):
    """Knows how to take less, or not."""

    def __init__(self, name="dear", price=1e4, least=1e4):
        super().__init__(name, cost={name: price})
        self.least, self.asked = least, []

    def limit_cost(self, snapshot, gradients):
        self.asked.append(gradients)
        self.costs = {self.name: self.least}
        return f"{self.least:g} of it"

    def update(self, snapshot):
        assert self.priced, "a measurement was started before its price was known"
        super().update(snapshot)

    def cost(self, snapshot):
        self.priced = True
        return super().cost(snapshot)

    priced = False


def test_what_costs_too_much_is_never_started_and_its_number_is_said(without_hooks):
    dear, cheap = Dear(), Fake("cheap", cost={"cheap": 2.0})
    monitor = Monitor(dear, cheap)
    with pytest.warns(UserWarning, match=r"skips dear \(one measurement costs 10000 gradients"):
        run(monitor, 30)
    assert not dear.seen and len(dear.asked) == 1 and cheap.seen[:4] == [0, 1, 2, 4]
    assert "10000 gradients" in monitor.skipped["dear"] and "dear" not in monitor.quantities


def test_what_can_take_less_does_so_and_is_labelled(without_hooks):
    dear = Dear(least=5.0)
    monitor = Monitor(dear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(monitor, 30)
    assert dear.seen and dear.asked == [pytest.approx(20 * monitor.budget.step)] and not monitor.skipped
    assert monitor.paths["dear"] == "exact, 5 of it" and monitor.cadence.paces["dear"].price == 5.0


def test_what_the_user_named_is_measured_at_once_and_then_as_the_budget_asks_for(without_hooks):
    dear = Dear(price=900.0, least=900.0)
    monitor = Monitor(dear, named=["dear"], budget=0.5)
    with pytest.warns(UserWarning, match="dear: one measurement costs 900 gradients") as caught:
        run(monitor, 3000)
    gaps = [b - a for a, b in pairwise(dear.seen)]
    assert len(caught) == 1 and gaps == pytest.approx([1800 / monitor.budget.step] * len(gaps), abs=1)
    assert dear.seen[0] == 0 and gaps
    assert monitor.cadence.account.advance == pytest.approx(900 + COUNTING, abs=1)


def test_a_pace_of_its_own_asks_for_no_price():
    dear = Dear()
    dear.priced = True
    monitor = Monitor(dear, Fake("other"), every_n_steps={"dear": 4})
    run(monitor, 9)
    assert dear.seen == [0, 4, 8] and not dear.asked and not monitor.skipped


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"every_n_steps": -1}, {"budget": 0}, {"budget": 1.5}])
def test_bad_settings_are_refused_by_name(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Monitor(Fake(), **settings)


def test_no_quantity_wants_nothing():
    assert not Monitor().wants(0) and Monitor().observe(snapshot(0)) is None


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_failure_is_nan_with_one_warning_and_touches_nobody_else():
    errors = {step: RuntimeError(f"step {step} has 1e-{step}") for step in (2, 3)} | {4: KeyError("other")}
    bad, good = Fake("bad", fails=errors), Fake("good")
    monitor = Monitor(bad, good, every_n_steps=1)
    with pytest.warns(UserWarning) as caught:
        observations = [monitor.observe(snapshot(step)) for step in range(6)]
    assert [str(w.message).split(": ")[1] for w in caught] == ["RuntimeError", "KeyError"]
    values = monitor.history["stability/bad"].values
    assert [math.isnan(v) for v in values] == [False, False, True, True, True, False]
    assert values[-1] == 3.0 and monitor.history["stability/good"].values == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert observations[2].failures == {"bad": "RuntimeError: step 2 has 1e-2"} and not observations[5].failures


def test_failures_for_one_reason_share_a_warning():
    monitor = Monitor(*(Fake(name, fails={0: ValueError("no 1")}) for name in "abc"), every_n_steps=1)
    with pytest.warns(UserWarning, match="measure a, b, c at step 0; reporting NaN: ValueError: no 1") as caught:
        monitor.observe(snapshot(0))
    assert len(caught) == 1


def test_a_failure_inside_a_window_ends_it():
    quantity = Fake(prepare=1, window=2, fails={1: ValueError("no")})
    monitor = Monitor(quantity, every_n_steps=5)
    with pytest.warns(UserWarning):
        assert run(monitor, 8) == [0, 1, 5, 6, 7]
    assert monitor.history["stability/fake"].steps == [1, 7]


def test_strict_raises_what_was_raised():
    with pytest.raises(KeyError, match="why"):
        Monitor(Fake(fails={0: KeyError("why")}), strict=True).observe(snapshot(0))


def test_require_leaves_out_what_cannot_be_measured():
    monitor = Monitor(Fake("a", unfit="no"), Fake("b", unfit="no"), Fake("c"), every_n_steps=1)
    with pytest.warns(UserWarning, match=r"skips a and b \(no\)") as caught:
        monitor.require(snapshot(0))
        monitor.require(snapshot(0))
    assert len(caught) == 1 and monitor.skipped == {"a": "no", "b": "no"}
    assert monitor.keys == {"stability/c"} and set(monitor.observe(snapshot(0)).values) >= monitor.keys


@pytest.mark.parametrize("settings", [{"named": ["a"]}, {"strict": True}])
def test_require_raises_for_what_was_asked_for(settings):
    with pytest.raises(Unmeasurable, match="a cannot be measured: no"):
        Monitor(Fake("a", unfit="no"), **settings).require(snapshot(0))


def test_a_disowned_update_takes_its_numbers_back():
    update, other = Fake("update"), Fake("other")
    other.needs_update = False
    monitor = Monitor(update, other, every_n_steps=1)
    run(monitor, 2)
    with pytest.warns(UserWarning, match=r"skips update \(why\)") as caught:
        corrected = monitor.invalidate_update_metrics(monitor.observe(snapshot(2)), "why")
        assert monitor.invalidate_update_metrics(None, "why") is None
    assert len(caught) == 1 and corrected.failures == {"update": "why"}
    assert math.isnan(corrected.values["stability/update"]) and math.isnan(corrected.values["stability/update/layer"])
    assert corrected.values["stability/other"] == 3.0
    assert monitor.history["stability/update"].values[:2] == [1.0, 2.0]
    assert math.isnan(monitor.history["stability/update"].values[2]) and set(monitor.quantities) == {"other"}
    with pytest.raises(Unmeasurable, match="update: why"):
        Monitor(Fake("update"), strict=True).invalidate_update_metrics(None, "why")


# -- memory --------------------------------------------------------------------------------------------------------


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("cut", range(1, 8))
def test_a_monitor_goes_on_from_its_state(cut, vectors):
    def make():
        return Monitor(Fake("window", prepare=1, window=2), Fake("point"), every_n_steps=4)

    whole, first, second = make(), make(), make()
    run(whole, cut), run(first, cut)
    second.load_state_dict(round_trip(first.state_dict(vectors=vectors)))
    assert run(whole, 12, cut) == run(first, 12, cut)  # saving changes nothing
    asked = run(second, 12, cut)
    if cut % 4 in (1, 2) and not vectors:  # a window is under way: it begins anew at once
        assert asked[:3] == [cut, cut + 1, cut + 2]
        expected = {1: [3, 6, 10], 2: [4, 10], 5: [2, 7, 10, 14], 6: [2, 8, 14]}
        assert second.history["stability/window"].steps == expected[cut]
    else:
        assert whole.history["stability/window"] == second.history["stability/window"]
    assert whole.history["stability/point"] == second.history["stability/point"]  # curves of layers start again


def test_scalars_of_real_quantities_survive():
    sgd = torch.optim.SGD(NET.parameters(), lr=0.25)
    first, second = (Monitor(Lyapunov(window=1), Sharpness(), every_n_steps=1) for _ in range(2))
    for step in range(6):
        first.observe(snapshot(step, sgd))
    second.load_state_dict(round_trip(first.state_dict()))
    for name, quantity in first.quantities.items():
        restored = second.quantities[name]
        assert restored.compute() == quantity.compute() and restored._update_count == quantity._update_count


def test_reset_is_as_before_a_first_run():
    monitor = Monitor(Fake("a", prepare=1, fails={9: ValueError("no")}), Fake("b", unfit="no"), budget=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor.require(snapshot(0))
        run(monitor, 3), monitor.reset()
    assert set(monitor.quantities) == {"a", "b"} and not monitor.history and not monitor.skipped
    assert not monitor.cadence.account.spent and monitor.cadence.account.origin is None and monitor.wants(17)
    assert monitor.quantities["a"].total == 0 and monitor.quantities["a"].under_way == 0
