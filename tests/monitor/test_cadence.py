"""When measurements start: the account, nearness to the edge, and what a checkpoint keeps of both."""

import io
import math
import warnings
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from harness import Model, fit
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lsp_callbacks import Monitor, Quantity, Snapshot, StabilityMonitor
from lsp_callbacks.monitor.account import ADVANCE, HEADLINE, SLOWEST
from lsp_callbacks.monitor.budget import COUNTING
from lsp_callbacks.monitor.cadence import Cadence
from lsp_callbacks.monitor.choice import Choice
from lsp_callbacks.operators.cost import step_cost

NET = torch.nn.Linear(1, 1)


class Dial(Quantity):
    """Reads a Courant number that the test has written down."""

    name, keys = "dial", ("stability/courant_sgd",)

    def __init__(self, courant, cost=1.0, window=1):
        super().__init__()
        self.courant, self.price, self.window = courant, cost, window
        self.add_state("value", default=torch.tensor(math.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot):
        return {"dial": self.price}

    def update(self, snapshot):
        self.value, self.complete = torch.tensor(self.courant(snapshot.step), dtype=torch.float64), True

    def compute(self):
        return {"stability/courant_sgd": self.value}


def starts(monitor, steps, begin=0, scheduled=None):
    """Steps at which the monitor measured."""
    found = []
    for step in range(begin, begin + steps):
        if monitor.wants(step, scheduled=math.nan if scheduled is None else scheduled(step)):
            monitor.observe(Snapshot(step, NET, replay=lambda: NET(torch.ones(1)).sum()))
            found.append(step)
    return found


def edge_in_the_middle(step):
    """Far, then near, then far again."""
    return 0.9 if 1000 <= step < 1400 else 0.1


# -- the account ---------------------------------------------------------------------------------------------------

COSTS = {
    "headline": {"forward": 0.4, "rows": 0.35}, "step": {"after": 0.4}, "norms": {"forward": 0.4, "norms": 1.1},
    "blocks": {"forward": 0.4, "blocks": 2.6}, "edge": {"forward": 0.4, "edge": 2.1},
    "exponent": {"forward": 0.4, "edge": 2.1, "window": 2.5},
}  # fmt: skip
WEIGHTS = {"headline": 0.6, "step": 0.3, "norms": 0.05, "blocks": 0.1, "edge": 0.1, "exponent": 0.8}


def paced(
    costs,
    courant,
    *,
    steps=1000,
    budget=0.04,
    begin=0,
    lengths=(),
    every=None,
    look=None,
    skipped=(),
    step_cost=1.0,
    counting=0.0,
):
    """Steps at which each quantity starts; the first one is the headline number. ``look`` sees the account.

    Costs are gradients by what they are spent on; two of them are those of the first measurement and of the others.
    """
    cadence, found = Cadence(every, budget), {name: [] for name in costs}
    for name, length in zip(costs, [*lengths, *[1] * len(costs)]):
        cadence.add(name, weight=WEIGHTS.get(name, 1.0), length=length)
    cadence.headline = next(iter(costs))
    until = {}
    for step in range(begin, begin + steps):
        if step in skipped:
            cadence.drop(skipped[step])
        cadence.under_way = {name for name, end in until.items() if step < end}
        names = cadence.starting(step)
        if names:
            cadence.observed(step)
            wanted = [name for name in names if cadence.wants_price(name)]
            cadence.priced(
                {
                    name: parts if isinstance(parts := costs[name], dict) else parts[min(cadence.paces[name].count, 1)]
                    for name in wanted
                },
                step_cost=step_cost, counting=counting * (step == begin),
            )  # fmt: skip
            names = cadence.starting(step)
            cadence.started(step, names)
            for name in names:
                found[name].append(step)
                until[name] = step + cadence.paces[name].length
            if cadence.headline in names:
                cadence.read(courant(step))
        if look is not None:
            look(cadence, step)
    return found


def union(names, costs):
    parts = {}
    for name in names:
        for part, gradients in costs[name].items():
            parts[part] = max(parts.get(part, 0.0), gradients)
    return sum(parts.values())


prices = st.dictionaries(st.sampled_from(["pass", "edge", "window"]), st.floats(0.01, 12.0), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), prices, min_size=1),
    st.lists(st.floats(0, 3) | st.just(math.nan), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), max_size=5),
    st.floats(0.01, 1.0),
    st.integers(0, 50),
    st.dictionaries(st.integers(60, 200), st.sampled_from("bcde"), max_size=2),
)
def test_spending_never_exceeds_the_budget_by_more_than_the_advance(costs, readings, lengths, budget, begin, skipped):
    """Counted here from the steps at which measurements start, not from the cadence's own account."""
    advances = []
    found = paced(
        costs, lambda step: readings[(step // 40) % len(readings)], steps=400, budget=budget, begin=begin,
        lengths=lengths, look=lambda cadence, step: advances.append(cadence.account.advance), skipped=skipped,
    )  # fmt: skip
    spent = 0.0
    for step in range(begin, begin + 400):
        spent += union([name for name, steps in found.items() if step in steps], costs)
        assert spent <= budget * (step - begin) + ADVANCE + 1e-6
    assert {*advances} == {ADVANCE}
    for name, length in zip(costs, [*lengths, *[1] * len(costs)]):
        assert all(b - a >= length for a, b in pairwise(found[name]))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), prices, min_size=1),
    st.lists(st.floats(0, 3) | st.just(math.nan), min_size=1, max_size=8),
    st.floats(0.01, 0.2),
)
def test_what_is_not_asked_would_have_been_answered_with_nothing(costs, readings, budget):
    """Asked at every step, the same starts."""

    def ask(cadence, step):
        cadence.next_step = -math.inf

    def courant(step):
        return readings[(step // 40) % len(readings)]

    asked = paced(costs, courant, steps=300, budget=budget, look=ask)
    assert paced(costs, courant, steps=300, budget=budget) == asked


def test_nothing_is_asked_at_an_idle_step(monkeypatch):
    asked, make = [], Choice.make
    monkeypatch.setattr(Choice, "make", lambda *args, **kwargs: asked.append(1) or make(*args, **kwargs))
    found = paced(COSTS, lambda step: 0.2)
    steps = {step for steps in found.values() for step in steps}
    assert len(asked) <= 3 * len(steps) + 3  # before and after each, and as all prices are found out anew


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 2.0), st.lists(prices, max_size=4), st.lists(st.floats(0, 1.5) | st.just(math.nan), min_size=1))
@example(2.0, [{f"own{k}": 0.4} for k in range(3)], [0.2])  # what is put by is not theirs, however cheap they are
def test_the_headline_number_has_no_long_gap_whatever_the_others_cost(price, others, readings):
    costs = {"headline": {"rows": price}} | {f"other{i}": parts for i, parts in enumerate(others)}
    found = paced(costs, lambda step: readings[(step // 40) % len(readings)], steps=600)["headline"]
    bound = max(math.ceil(price / (HEADLINE * 0.04)), SLOWEST)
    assert all(b - a <= bound + 1 for a, b in pairwise([*found, 600]) if a > 100)


#: Prices of an MLP with momentum, a residual CNN and a transformer as they should be: gradients of a step, of a reading
#: of the headline number, of the exponent's window, and of residual blocks; how many readings of the headline number
#: there must be, and their largest gap; and how many of each other far from the edge.
AIMS = [(1.44, 0.75, 2.5, None, 40, 50, 3), (1.1, 1.0, 2.5, 2.6, 30, 50, 1), (1.0, 1.5, 2.5, 2.6, 20, 100, 1)]


@pytest.mark.parametrize("step_cost, price, window, blocks, readings, gap, least", AIMS)
@pytest.mark.parametrize("courant", [0.2, 0.9, math.nan])
def test_readings_at_the_default_budget(step_cost, price, window, blocks, readings, gap, least, courant):
    costs = COSTS | {"headline": {"rows": price}, "exponent": {"forward": 0.4, "edge": 2.1, "window": window}}
    costs["blocks"] = {"forward": 0.4, "blocks": blocks or 0.0}
    if blocks is None:
        del costs["blocks"]
    advances = []
    found = paced(
        costs, lambda step: courant, step_cost=step_cost, lengths=[1, 2],
        look=lambda cadence, step: advances.append(cadence.account.spent),
    )  # fmt: skip
    assert len(found["headline"]) >= readings and found["headline"][:5] == [0, 1, 2, 4, 8]
    assert max(b - a for a, b in pairwise(found["headline"]) if b > 100) <= gap
    assert courant == 0.9 or all(len(steps) >= least for steps in found.values())
    assert 0.85 * 55 * step_cost < advances[-1] < 55 * step_cost + 1e-6  # what there is, is spent


def priced(step_cost, hooks, headline, edge, exponent, norms, step, blocks=None):
    """Prices with the hooks of a step and the replay of 0.4 that they share."""
    beside = {"hooks": hooks}
    replay = {"forward": 0.4, **beside}
    costs = {
        "headline": {"rows": headline - hooks, **beside}, "step": {"after": step - hooks, **beside},
        "norms": {"norms": norms - 0.4 - hooks, **replay}, "edge": {"edge": edge - 0.4 - hooks, **replay},
        "exponent": {"edge": edge - 0.4 - hooks, "window": exponent - edge, **replay},
    }  # fmt: skip
    return step_cost, costs | ({} if blocks is None else {"blocks": {"blocks": blocks - 0.4 - hooks, **replay}})


#: Networks with what a step and a measurement of each quantity cost, and the least readings of the headline number and
#: of each other, and the largest gap: as they should be, and as they were when this was written.
RUNS = {
    "MLP": (priced(1.66, 0.4, 1.0, 2.5, 5.0, 1.5, 0.7), 40, 3, 50),
    "MLP with momentum": (priced(1.66, 0.4, 1.0, 2.5, 9.0, 1.5, 0.7), 40, 3, 50),
    "MLP as it is": (priced(1.66, 0.4, 2.0, 7.1, 9.3, 5.3, 2.0), 25, 1, 55),
    "CNN": (priced(1.15, 0.1, 1.0, 2.5, 5.0, 1.5, 0.7, 3.0), 30, 1, 50),
    "CNN as it is": (priced(1.15, 0.1, 2.2, 4.8, 6.1, 3.0, 2.1, 4.4), 15, 0, 100),
    "char transformer": (priced(1.05, 0.1, 1.5, 2.5, 9.0, 1.5, 0.7, 3.0), 20, 0, 100),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("courant", [0.2, 0.9])
def test_the_first_thousand_steps_of_a_run(name, courant):
    """The advance, and what the first measured step takes, included: at most 5.5 %, the headline number first."""
    (step_cost, costs), readings, least, gap = RUNS[name]
    spent = []
    found = paced(
        costs, lambda step: courant, step_cost=step_cost, lengths=[1, 2], counting=COUNTING,
        look=lambda cadence, step: spent.append(cadence.account.spent),
    )  # fmt: skip
    assert len(found["headline"]) >= readings
    assert max(b - a for a, b in pairwise([*found["headline"], 1000]) if b > 100) <= gap
    assert courant == 0.9 or all(len(steps) >= least for steps in found.values())
    assert 45 * step_cost < spent[-1] <= 55 * step_cost


def with_first(headline, edge, norms, step, blocks=None, hooks=0.33, replay=0.49, modules=0.46):
    """Prices of first measurements, and of those that start from them."""
    shared = {"forward": replay, "hooks": hooks}
    costs = {
        "headline": [{"rows": price - hooks, "hooks": hooks} for price in headline],
        "step": [{"after": price, "hooks": hooks} for price in step],
        "norms": [{"norms": price, "modules": modules, **shared} for price in norms],
        "edge": [{"edge": price, **shared} for price in edge],
        "exponent": [{"edge": price, "window": 0.24, **shared} for price in edge],
    }  # fmt: skip
    return costs | ({} if blocks is None else {"blocks": [{"blocks": p, "modules": modules, **shared} for p in blocks]})


#: What a step and measurements cost today, and the least readings of the headline number and of each other.
TODAY = {
    "MLP": (1.66, with_first((7.0, 1.1), (6.0, 4.6), (4.8, 1.0), (3.1, 1.6)), 40, 3),
    "CNN": (1.15, with_first((6.9, 1.06), (4.2, 3.3), (3.3, 1.6), (2.1, 0.6), (3.7, 2.3), 0.07, 0.37, 0.33), 30, 1),
}


@pytest.mark.parametrize("name", TODAY)
@pytest.mark.parametrize("courant", [0.2, 0.9])
def test_all_are_measured_once_before_one_of_them_is_measured_again(name, courant):
    """Near the edge, too: then the headline number takes half of what the others have, who wait longer."""
    step_cost, costs, readings, least = TODAY[name]
    spent = []
    found = paced(
        costs, lambda step: courant, step_cost=step_cost, lengths=[1, 2], counting=COUNTING,
        look=lambda cadence, step: spent.append(cadence.account.spent),
    )  # fmt: skip
    headline = found.pop("headline")
    assert len(headline) >= readings
    assert max(b - a for a, b in pairwise([*headline, 1000]) if b > 100) <= 50
    assert courant == 0.9 or all(len(steps) >= least for steps in found.values())
    last = max(steps[0] if steps else 1000 for steps in found.values())
    assert all(len(steps) <= 1 or steps[1] >= last for steps in found.values())
    assert 45 * step_cost < spent[-1] <= 55 * step_cost


def test_what_takes_too_long_to_pay_keeps_no_other_from_being_measured_again():
    costs = {"headline": {"rows": 0.5}, "cheap": {"cheap": 0.5}, "dear": {"dear": 19.0}}
    found = paced(costs, lambda step: 0.2, counting=COUNTING)
    assert len(found["cheap"]) >= 3


@pytest.mark.parametrize("price", [0.2, 0.5, 0.75, 1.5])
def test_a_run_at_the_edge_from_its_first_step_on_is_measured_oftener(price):
    costs = COSTS | {"headline": {"rows": price}}
    far, near = (len(paced(costs, lambda step: courant, steps=2000)["headline"]) for courant in (0.2, 0.9))  # noqa: B023
    assert near >= 1.15 * far and (price > 0.5 or near >= 1.5 * far)


@pytest.mark.parametrize("name", TODAY)
def test_near_the_edge_the_first_measurements_of_the_others_wait(name):
    """Steps 100 to 600, in which most of the others are measured for the first time."""
    step_cost, costs, _, _ = TODAY[name]
    settings = {"steps": 600, "step_cost": step_cost, "lengths": [1, 2], "counting": COUNTING}
    far, near = (paced(costs, lambda step: courant, **settings)["headline"] for courant in (0.2, 0.9))  # noqa: B023
    assert sum(step >= 100 for step in near) >= 1.25 * sum(step >= 100 for step in far)


def test_what_is_saved_far_from_the_edge_is_spent_near_it():
    found = paced({"headline": {"rows": 0.4}}, edge_in_the_middle, steps=2000)["headline"]
    gaps = [b - a for a, b in pairwise(found)]
    assert {gap for gap, step in zip(gaps, found) if 100 < step < 950} == {25}
    assert max(gap for gap, step in zip(gaps, found) if 1050 < step < 1375) <= 4
    assert gaps[-3:] == [25, 25, 25]


def test_first_readings_double_their_distance_until_the_period():
    assert paced({"a": {"pass": 0.5}}, lambda step: 0.1, steps=120)["a"] == [0, 1, 2, 4, 8, 16, 32, 57, 82, 107]


def test_what_spends_gradients_on_the_same_meets():
    """Beside the first, the second costs 1 of 5: it is measured nearly as often, for a third of the budget."""
    costs = {"edge": {"edge": 4.0, "a": 1.0}, "exponent": {"edge": 4.0, "b": 1.0}}
    found = paced(costs, lambda step: math.nan, steps=3000)
    assert {*found["exponent"][1:]} <= {*found["edge"]} and len(found["exponent"]) > 0.7 * len(found["edge"])


def test_all_are_measured_beside_the_headline_number():
    """A replay costs 0.4 of each."""
    found = paced(COSTS, lambda step: 0.2, steps=2000)
    assert all({*steps} <= {*found["headline"]} for steps in found.values())


def test_the_shares_of_what_is_skipped_go_to_the_others():
    costs = {"headline": {"rows": 0.5}, "dear": {"dear": 4.0}, "cheap": {"cheap": 1.0}}
    both, one = (paced(costs, lambda step: 0.1, steps=2000, skipped=skips) for skips in ((), {150: "dear"}))
    late = [sum(step > 200 for step in found["cheap"]) for found in (both, one)]
    assert late[1] > 1.8 * late[0] > 0


def test_what_the_budget_has_not_paid_for_yet_is_said_with_its_price():
    class Dear(Dial):
        name, keys, weight = "dear", ("stability/sharpness",), 0.01

        def cost(self, snapshot):
            return {"dear": 19 * step_cost(snapshot)}

        def compute(self):
            return {"stability/sharpness": self.value}

    monitor = Monitor(Dial(lambda step: 0.1, cost=0.5), Dear(lambda step: 1.0))
    starts(monitor, 30)
    assert [*monitor.skipped] == ["dear"] and "stability/sharpness" not in monitor.history
    assert f"{monitor.cadence.paces['dear'].price:.3g} gradients" in monitor.skipped["dear"]
    monitor.cadence.postpone("dear", 40)
    assert "from 40 on" in monitor.skipped["dear"]
    monitor.skip({"it cannot be measured": ["dear"]}, warn=False)
    assert monitor.skipped == {"dear": "it cannot be measured"}


def test_the_rate_that_comes_next_brings_the_measurement_forward():
    """The last reading is far from the edge; the schedule has moved since."""
    growing = lambda step: 0.3 * 1.01**step  # noqa: E731
    blind, seeing = (Monitor(Dial(growing, 0.5), budget=0.04) for _ in range(2))
    assert len(starts(seeing, 100, scheduled=growing)) > len(starts(blind, 100))


def test_readings_of_noise_do_not_hide_the_edge():
    """The mean of three is far, the last one near."""
    monitor = Monitor(Dial(lambda step: 0.9 if step == 107 else 0.0, cost=0.5), budget=0.04)
    found = starts(monitor, 140)
    assert 107 in found and found[found.index(107) + 1] - 107 < 10


@pytest.mark.parametrize("courant", [0.0, 0.9, math.nan])
def test_a_whole_number_is_obeyed_wherever_the_edge_is(courant):
    monitor = Monitor(Dial(lambda step: courant), every_n_steps=7)
    assert starts(monitor, 50, 3, scheduled=lambda step: courant) == [*range(3, 53, 7)]


def test_some_have_a_pace_of_their_own_and_the_others_keep_to_the_budget():
    found = paced(COSTS, lambda step: 0.2, every={"norms": 50, "step": 400})
    assert found["norms"] == [*range(0, 1000, 50)] and found["step"] == [0, 400, 800]
    rest = {name: parts for name, parts in COSTS.items() if name not in {"norms", "step"}}
    assert {name: found[name] for name in rest} == paced(rest, lambda step: 0.2)


@pytest.mark.parametrize("every", [{"dail": 5}, {"dial": 5, "sharpness": 2}])
def test_a_pace_of_what_is_not_measured_is_refused(every):
    with pytest.raises(ValueError, match=r"every_n_steps.*(dail|sharpness).*not measured.*dial"):
        Monitor(Dial(lambda step: 0.1), every_n_steps=every)


@pytest.mark.parametrize("every", [{"dial": 0}, {"dial": 2.5}, {"dial": True}, "often"])
def test_a_pace_that_is_no_number_of_steps_is_refused(every):
    with pytest.raises(ValueError, match="every_n_steps"):
        Monitor(Dial(lambda step: 0.1), every_n_steps=every)


def test_the_first_answer_for_a_step_stands():
    cadence = Cadence(budget=0.1)
    cadence.add("a")
    cadence.headline = "a"
    assert cadence.starting(0) == ("a",)
    cadence.observed(0), cadence.priced({"a": {"pass": 1.0}}), cadence.started(0, ["a"])
    cadence.observed(20), cadence.started(20, ["a"])
    assert cadence.starting(24) == cadence.starting(24, scheduled=0.9) == ()
    assert cadence.starting(25, scheduled=0.9) == cadence.starting(25) == ("a",)


def test_a_step_that_is_not_taken_is_made_up_for():
    """`training_step` returned None where a measurement was due."""
    for every in (None, 10):
        monitor, found = Monitor(Dial(lambda step: 0.1), every_n_steps=every, budget=0.04), []
        for step in range(60):
            if monitor.wants(step) and step not in {10, 11, 25, 30}:
                found.append(step)
                monitor.observe(Snapshot(step, NET, replay=lambda: NET(torch.ones(1)).sum()))
        if every:
            assert found == [0, 12, 20, 31, 40, 50]
        else:
            assert found[:5] == [0, 1, 2, 4, 8] and len(found) >= 6


def test_a_measurement_does_not_start_inside_another():
    monitor = Monitor(Dial(lambda step: 0.9, cost=0.1, window=8), budget=1.0)
    assert starts(monitor, 40) == [0, 8, 16, 24, 32]


# -- checkpoints ---------------------------------------------------------------------------------------------------


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cut", [1, 95, 1010, 1205, 1500])
def test_a_resumed_run_measures_at_the_same_steps(cut):
    whole, first, second = (Monitor(Dial(edge_in_the_middle), budget=1 / 30) for _ in range(3))
    starts(first, cut)
    second.load_state_dict(round_trip(first.state_dict()))
    expected = starts(whole, 2000)
    assert starts(second, 2000 - cut, cut) == [step for step in expected if step >= cut]
    assert second.cadence.state_dict() == whole.cadence.state_dict()


def test_the_trainer_resumes_the_schedule_of_measurements(tmp_path):
    """Growing rate, real quantities: the same steps, with the checkpoint in the middle of a far stretch."""

    class Growing(Model):
        def __init__(self):
            super().__init__()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.018**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def monitor():
        return StabilityMonitor("economy", budget=1.0, save_vectors=True)  # a cold start costs more

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 48:  # the end of an epoch: the order of the batches begins anew there
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    loader = {"loader": torch.utils.data.DataLoader(data_in_order(), batch_size=8)}
    whole, resumed = monitor(), monitor()
    fit(Growing, whole, Save(), max_steps=330, **loader)
    fit(Growing, resumed, max_steps=330, ckpt_path=tmp_path / "cut.ckpt", **loader)
    steps = whole.history["stability/courant"].steps
    gaps = [b - a for a, b in pairwise(steps)]
    assert resumed.history["stability/courant"].steps == steps
    far = [gap for gap, step in zip(gaps, steps) if 60 < step < 150]
    near = [gap for gap, step in zip(gaps, steps) if step > 250]
    assert sum(near) / len(near) < sum(far) / len(far)
    account = whole.monitor.cadence.account
    assert account.spent <= account.income * (330 - steps[0]) + account.advance
    own, expected = (run.monitor.cadence.state_dict() for run in (resumed, whole))
    del own["readings"], expected["readings"]  # a resumed run has lost its warm starts
    assert own == expected


def data_in_order():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ({"every_n_steps": 10}, {"budget": 0.1}, [25, 26, 27, 29, 33, 41]),  # the cost is not known: it begins anew
        ({"budget": 0.1}, {"every_n_steps": 7}, [28, 35, 42, 49]),
        ({"budget": 0.1}, {"budget": 0.05}, [32, 52]),  # the next one of its first readings, then its new period
    ],
)
def test_another_cadence_may_go_on(before, after, expected):
    dial = Dial(lambda step: math.nan)
    first, second = Monitor(dial, **before), Monitor(Dial(lambda step: math.nan), **after)
    starts(first, 25)
    second.load_state_dict(round_trip(first.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert starts(second, 30, 25)[: len(expected)] == expected
