"""When measurements start: the account, nearness to the edge, and what a checkpoint keeps of both."""

import io
import math
import warnings
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from harness import Model, fit
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_callbacks import Monitor, Quantity, Snapshot, StabilityMonitor
from lsp_callbacks.monitor.cadence import SPREAD, Cadence, spacing

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


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 3) | st.just(math.nan), min_size=1, max_size=8),
    st.floats(0.3, 30.0),
    st.floats(0.02, 1.0),
    st.integers(0, 50),
)
def test_spending_never_exceeds_the_budget_by_more_than_the_first_measurement(readings, cost, budget, begin):
    monitor = Monitor(Dial(lambda step: readings[(step // 40) % len(readings)], cost), budget=budget)
    found = starts(monitor, 400, begin)
    assert found[0] == begin
    for n, step in enumerate(found, 1):
        assert n * cost <= budget * (step - begin) + cost + 1e-6
    gaps = [b - a for a, b in pairwise(found)]
    assert all(
        math.floor(monitor.cadence.period / SPREAD) <= gap <= math.ceil(SPREAD * monitor.cadence.period) for gap in gaps
    )
    assert 400 - (found[-1] - begin) <= math.ceil(SPREAD * monitor.cadence.period)


def test_what_is_saved_far_from_the_edge_is_spent_near_it():
    adaptive = Monitor(Dial(edge_in_the_middle), budget=1 / 30)
    found = starts(adaptive, 2000)
    near = [step for step in found if 1000 <= step < 1400]
    assert adaptive.cadence.period == 30 and found[:4] == [0, 90, 180, 270]
    assert [b - a for a, b in pairwise(near)] == [10] * (len(near) - 1) and len(near) > 2 * 400 / 30
    assert len(found) <= 2000 / 30 + 1
    assert [b - a for a, b in zip(found[-4:], found[-3:])] == [90, 90, 90]


def test_a_run_at_the_edge_from_its_first_step_on_has_nothing_saved():
    assert starts(Monitor(Dial(lambda step: 1.0), budget=0.05), 100) == [0, 20, 40, 60, 80]


def test_the_rate_that_comes_next_brings_the_measurement_forward():
    """The last reading is far from the edge; the schedule has moved since."""
    growing = lambda step: 0.1 * 1.02**step  # noqa: E731
    blind = starts(Monitor(Dial(growing), budget=0.02), 130)
    seeing = starts(Monitor(Dial(growing), budget=0.02), 130, scheduled=growing)
    assert blind == [0]
    second = seeing[1]
    assert second >= 50 * spacing(growing(second)) and second - 1 < 50 * spacing(growing(second - 1))


def test_readings_of_noise_do_not_hide_the_edge():
    """The mean of three is far, the last one near."""
    monitor = Monitor(Dial(lambda step: 0.9 if step == 60 else 0.0), budget=0.05)
    assert starts(monitor, 100)[:3] == [0, 60, 60 + math.ceil(20 / 3)]


@pytest.mark.parametrize("courant", [0.0, 0.9, math.nan])
def test_a_whole_number_is_obeyed_wherever_the_edge_is(courant):
    monitor = Monitor(Dial(lambda step: courant), every_n_steps=7)
    assert starts(monitor, 50, 3, scheduled=lambda step: courant) == [*range(3, 53, 7)]


def test_the_first_answer_for_a_step_stands():
    cadence = Cadence(budget=0.1)
    cadence.started(0), cadence.priced(1.0, 1), cadence.started(20)
    cadence.spent = 0.0
    assert cadence.starts(24, scheduled=0.9) and cadence.starts(24)
    assert not cadence.starts(25) and not cadence.starts(25, scheduled=0.9)


def test_a_measurement_does_not_start_inside_another():
    monitor = Monitor(Dial(lambda step: 0.9, cost=0.1, window=8), budget=1.0)
    assert starts(monitor, 40) == [0, 8, 16, 24, 32]


def test_fewer_quantities_cost_less():
    """One is left out after the cost was known: the next measurements come more often."""
    dear, cheap = Dial(lambda step: math.nan, cost=9.0), Dial(lambda step: math.nan, cost=1.0)
    dear.name, dear.price, dear.needs_update = "dear", 9.0, True
    dear.cost = lambda snapshot: {"dear": 9.0}
    monitor = Monitor(dear, cheap, budget=0.1)
    assert starts(monitor, 150) == [0, 100]
    with pytest.warns(UserWarning, match="skips dear"):
        monitor.invalidate_update_metrics(None, "no")
    assert starts(monitor, 200, 150) == [*range(200, 350, 10)]


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
        return StabilityMonitor("economy", budget=1.0)

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
    assert min(gaps) < whole.monitor.cadence.period < max(gaps)
    account = whole.monitor.cadence
    assert all(n * account.cost <= account.budget * (step - steps[0]) for n, step in enumerate(steps))
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
        ({"every_n_steps": 10}, {"budget": 0.1}, [25, 35, 45]),  # the cost is not known: it begins anew
        ({"budget": 0.1}, {"every_n_steps": 7}, [28, 35, 42, 49]),
        ({"budget": 0.1}, {"budget": 0.05}, [60]),  # what was spent by the larger budget is paid back
    ],
)
def test_another_cadence_may_go_on(before, after, expected):
    dial = Dial(lambda step: math.nan)
    first, second = Monitor(dial, **before), Monitor(Dial(lambda step: math.nan), **after)
    starts(first, 25)
    second.load_state_dict(round_trip(first.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert starts(second, 26 if expected != [60] else 40, 25) == expected
