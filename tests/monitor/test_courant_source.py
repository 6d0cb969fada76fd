"""What ``stability/courant`` is: one number for a whole run."""

import math
import warnings

import pytest
import torch

from lsp_callbacks import Monitor, Snapshot, Unmeasurable
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.monitor.courant_source import COURANT, GD, SGD, SOURCE, CourantSource
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.report import Run, judge

NAN, NET = math.nan, torch.nn.Linear(1, 1)


class Scripted(Quantity):
    """Says what it is told to, step by step: a number, None while it waits, or an exception."""

    key_states = False

    def __init__(self, name, key, script):
        super().__init__()
        self.name, self.keys, self.script = name, (key,), script

    def cost(self, snapshot):
        return {}

    def update(self, snapshot):
        self.complete, now = False, self.script[snapshot.step]
        if isinstance(now, Exception):
            raise now
        self.now, self.complete = now, now is not None

    def compute(self):
        return {self.keys[0]: torch.tensor(self.now)}


def observed(gd=None, sgd=None, steps=range(6), monitor=None):
    """A monitor that has seen the steps."""
    scripts = {"sharpness": (GD, gd), "sgd_stability": (SGD, sgd)}
    made = [Scripted(name, key, script) for name, (key, script) in scripts.items() if script is not None]
    monitor = monitor or Monitor(*made, every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            monitor.observe(Snapshot(step, NET, replay=lambda: NET(torch.ones(1, 1)).sum()))
    return monitor


def curve(monitor, key):
    found = monitor.history.get(key)
    return {} if found is None else dict(zip(found.steps, found.values))


@pytest.mark.parametrize(
    "gd, sgd, source, expected",
    [
        ([0.1] * 6, [None, None, 0.7, 0.8, 0.9, 0.6], "courant_sgd", {2: 0.7, 3: 0.8, 4: 0.9, 5: 0.6}),
        ([0.1] * 6, [None, 0.7, ValueError(), ValueError(), 0.9, 0.6], "courant_sgd",
         {1: 0.7, 2: NAN, 3: NAN, 4: 0.9, 5: 0.6}),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [None, ValueError(), 7.0, 7.0, 7.0, 7.0], "courant_gd",
         {1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6}),
        ([0.1, None, None, 0.4, 0.5, 0.6], [None, None, Unsupported("no"), 7.0, 7.0, 7.0], "courant_gd",
         {0: 0.1, 3: 0.4, 4: 0.5, 5: 0.6}),
        ([0.1, None, None, 0.4, 0.5, 0.6], [None, None, ValueError(), 7.0, 7.0, 7.0], "courant_gd",
         {0: 0.1, 3: 0.4, 4: 0.5, 5: 0.6}),
        ([0.1] * 6, [None, 0.7, Unsupported("no"), 0.7, 0.7, 0.7], "courant_sgd",
         {1: 0.7, 2: NAN, 3: NAN, 4: NAN, 5: NAN}),
        ([0.1, ValueError(), 0.3, 0.4, 0.5, 0.6], None, "courant_gd", {0: 0.1, 1: NAN, 2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6}),
        (None, [None, 0.7, NAN, 0.7, 0.7, 0.7], "courant_sgd", {1: 0.7, 2: NAN, 3: 0.7, 4: 0.7, 5: 0.7}),
        ([0.1] * 6, [None] * 6, None, {}),
    ],
    ids=["waits", "fails and is back", "fails at first", "left out at last", "fails late at first", "left out later",
         "only gd", "only sgd", "never full"],
)  # fmt: skip
def test_one_number_for_a_whole_run(gd, sgd, source, expected):
    monitor = observed(gd, sgd)
    assert curve(monitor, COURANT) == pytest.approx(expected, nan_ok=True) and monitor.courant.name == source
    codes = curve(monitor, SOURCE)
    told = [step for step, value in expected.items() if not math.isnan(value)]
    assert codes == dict.fromkeys(told, {"courant_gd": 0.0, "courant_sgd": 1.0}.get(source))
    own = {} if source is None else curve(monitor, f"stability/{source}")
    assert all(value == own[step] for step, value in curve(monitor, COURANT).items() if not math.isnan(value))
    assert {COURANT, SOURCE} <= monitor.keys


@pytest.mark.parametrize("cut", range(1, 6))
def test_it_is_the_same_after_a_resume(cut):
    scripts = [0.1] * 6, [None, None, 0.7, ValueError(), 0.9, 0.6]
    whole, first = observed(*scripts), observed(*scripts, steps=range(cut))
    second = observed(*scripts, steps=())
    second.load_state_dict(first.state_dict())
    observed(steps=range(cut, 6), monitor=second)
    assert curve(second, COURANT) == pytest.approx(curve(whole, COURANT), nan_ok=True)
    assert second.courant.name == whole.courant.name == "courant_sgd"


def test_states_of_other_runs():
    """A run that does not measure the number any more."""
    state = observed([0.1] * 6, [None, 0.7, 0.7, 0.7, 0.7, 0.7]).state_dict()
    other = observed([0.1] * 9, steps=())
    with pytest.warns(UserWarning, match="courant_sgd before"):
        other.load_state_dict(state)
    observed(steps=range(6, 9), monitor=other)
    assert other.courant.name == "courant_gd" and curve(other, COURANT)[8] == pytest.approx(0.1)


def test_a_number_that_was_given_up_does_not_speak_for_the_end():
    """Left out in mid-run, as by a time limit, while the curvature goes on and says something else."""
    monitor = observed([0.2, 0.2, 4.0, 6.0, 8.0, 8.0], [0.2, 0.2, Unsupported("no"), 0.2, 0.2, 0.2])
    told = judge(Run(monitor.history, step=5))
    assert told.state == "unknown" and told.cause == "failed"


def test_what_stands_in_is_never_the_headline_number():
    source = CourantSource()
    assert source.value(0, {GD: 2.0}, {GD, SGD}) is None and source.reading({GD: 2.0}) == 2.0
    assert source.value(1, {SGD: 0.5, GD: 2.0}, {GD, SGD}) == (1, 0.5) and source.reading({SGD: 0.5, GD: 2.0}) == 0.5
    assert source.value(2, {GD: 2.0}, {GD, SGD}) is None  # complete some steps later
    assert math.isnan(source.reading({GD: 2.0}))
    assert math.isnan(source.value(3, {SGD: NAN, GD: 2.0}, {GD, SGD})[1])
    assert source.reading({SGD: NAN, GD: 2.0}) == 2.0


def test_a_disowned_update_takes_the_headline_number_back():
    monitor = observed([0.1] * 6, [0.7] * 6)
    for quantity in monitor.quantities.values():
        quantity.needs_update = True
    observation = monitor.observe(Snapshot(5, NET, replay=lambda: NET(torch.ones(1, 1)).sum()))
    with pytest.warns(UserWarning):
        corrected = monitor.invalidate_update_metrics(observation, "why")
    assert math.isnan(corrected.values[COURANT]) and math.isnan(monitor.history[COURANT].values[-1])


def test_a_named_quantity_still_raises():
    with pytest.raises(Unmeasurable):
        strict = Monitor(Scripted("sgd_stability", SGD, [Unmeasurable("no")]), every_n_steps=1, strict=True)
        observed(steps=range(1), monitor=strict)
