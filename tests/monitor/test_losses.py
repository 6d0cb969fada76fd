"""What is remembered of the loss, and how it comes from its device."""

import math

import pytest
import torch
from problems import random

from lsp_callbacks.monitor.losses import LEFT_OUT, SETTLED, SMOOTHING, Arrivals, ArrivedLoss, LossRecord
from lsp_callbacks.report import loss_alarm

NAN = math.nan


def recorded(losses, record=None, start=0):
    record = record or LossRecord()
    for step, loss in enumerate(losses, start):
        record.add(ArrivedLoss(step, loss))
    return record


def test_the_means_are_those_of_their_definition():
    torch.manual_seed(0)
    losses = torch.rand(200, dtype=torch.float64).tolist()
    record = recorded(losses)
    smoothed, means = losses[0], []
    for k, loss in enumerate(losses, 1):
        smoothed += (loss - smoothed) / min(k, SMOOTHING)
        means.append(smoothed)
    assert record.smoothed == pytest.approx(means[-1]) and record.least == pytest.approx(min(means))
    assert record.first == losses[0] and record.initial == pytest.approx(sum(losses[:5]) / 5)
    assert record.last == losses[-1] and record.last_step == 199 and record.count == 200


@pytest.mark.parametrize(
    "losses, fallen, risen, lost",
    [
        ([2.3] * SETTLED, False, False, False),
        ([2.3] * (SETTLED - 1), None, False, False),
        ([2.3 - 0.01 * k for k in range(99)], True, False, False),
        ([2.3] + [50.0] * 9 + [2.4] * 200, False, False, False),  # at chance after an explosion
        ([2.3] * 5 + [1.0] * 95 + [2.4] * 99, False, True, False),
        ([2.3] * 5 + [1.0] * 95 + [9.0] * 300, False, True, True),
        ([2.3] * 99 + [1e6] + [2.3] * 10, False, True, False),  # a spike
        ([-1.0] + [-2.0] * 99, True, False, False),
        ([-1.0] * 99, False, False, False),
        ([-2.0] * 60 + [9.0] * 400, False, True, True),
        ([2.3] * 20 + [20.0] * 130 + [2.3] * 20, False, True, False),
    ],
)
def test_what_the_loss_did(losses, fallen, risen, lost):
    record = recorded(losses)
    assert (record.fallen, record.risen, record.lost) == (fallen, risen, lost) and record.finite
    record.comparable = False  # the sum of several players' losses
    assert (record.fallen, record.risen, record.lost) == (None, False, False)


def test_scaling_the_loss_changes_nothing():
    torch.manual_seed(1)
    for _ in range(20):
        losses = (torch.rand(400).cumsum(0) * torch.randn(()) + 1 + torch.rand(400)).tolist()
        found = [recorded([c * loss for loss in losses]) for c in (1.0, 1e-6, 1e6)]
        assert len({(r.fallen, r.risen, r.lost, r.level_step, r.forgotten, r.relapsed) for r in found}) == 1


@pytest.mark.parametrize(
    "losses, forgotten, relapsed",
    [
        ([2.0] * 5 + [1.0] * 95 + [1.35] * 200, False, False),  # a third of what was learned
        ([2.0] * 5 + [1.0] * 95 + [1.45] * 200, True, False),
        ([2.0] * 5 + [0.2] * 95 + [1.8] * 200, True, False),
        ([2.0] * 5 + [0.2] * 95 + [1.95] * 20, True, True),
        ([2.0] * 5 + [0.2] * 95 + [9.0] * 10, True, False),  # the alarm is on for nine steps
        ([2.0] * 5 + [0.2] * 95 + [9.0] * 11, True, True),
        ([2.0] * 5 + [0.2] * 95 + [9.0] * 4 + [0.2] * 9, True, False),  # a spike
        ([2.0] * 50 + [2.2] * 200, False, False),
        ([2.0] * 50 + [2.6] * 200, True, False),  # it has never fallen
        ([-2.0] * 5 + [-3.0] * 95 + [-2.1] * 200, True, False),
        ([-2.0] * 5 + [-4.0] * 95 + [-2.9] * 200, True, False),
        ([-2.0] * 5 + [-12.0] * 95 + [-8.5] * 200, False, False),
    ],
)
def test_how_much_of_what_was_learned_is_lost(losses, forgotten, relapsed):
    record = recorded(losses)
    assert (record.forgotten, record.relapsed) == (forgotten, relapsed)
    record.comparable = False
    assert not record.forgotten and not record.relapsed


def test_what_is_not_finite_is_remembered_and_does_not_spoil_the_means():
    record = recorded([1.0] * 40 + [NAN] + [1.0] * 3)
    assert record.finite and record.nonfinite_step == 40 and record.smoothed == pytest.approx(1.0)
    assert not recorded([1.0, math.inf]).finite and recorded([1.0, math.inf]).nonfinite_step == 1
    for step in range(LEFT_OUT - 1):
        record.add(ArrivedLoss(44 + step, NAN, left_out=True))
    assert record.finite
    record.add(ArrivedLoss(99, NAN, left_out=True))
    assert not record.finite


@pytest.mark.parametrize("cut", [1, 4, 33, 70])
def test_it_goes_on_from_its_state(cut):
    losses = [math.exp(-k / 20) for k in range(60)] + [2.0] * 20 + [NAN]
    again = LossRecord()
    again.load_state_dict(recorded(losses[:cut]).state_dict())
    assert recorded(losses[cut:], again, cut).state_dict() == recorded(losses).state_dict()
    assert all(isinstance(v, int | float | bool | list | None) for v in again.state_dict().values())
    again.load_state_dict({})
    assert again.state_dict() == LossRecord().state_dict()


# -- from the device --------------------------------------------------------------------------------------------------


def test_on_the_cpu_a_loss_is_there_at_once():
    arrivals = Arrivals()
    assert arrivals.take(3, torch.tensor(2.0, requires_grad=True)) == [ArrivedLoss(3, 2.0)]
    assert arrivals.take(4, torch.tensor([1.0, 3.0])) == [ArrivedLoss(4, 2.0)]
    assert arrivals.take(5, 7.0) == [ArrivedLoss(5, 7.0)] and arrivals.take(6, None) == []
    assert arrivals.take(7, torch.tensor(math.nan, dtype=torch.bfloat16), left_out=True)[0].left_out


class Event:
    """Of a device that is some steps behind."""

    def __init__(self, ready):
        self.ready, self.waited = ready, False

    def query(self):
        return self.ready <= Event.now

    def synchronize(self):
        self.waited = not self.query()


class Late(Arrivals):
    """Copies that take a while, as on a CUDA device."""

    def __init__(self, late, most=10):
        super().__init__(most)
        self.late, self.events = late, []

    def take(self, step, loss, **settings):
        Event.now = step
        if loss is not None:
            self.events.append(Event(step + self.late))
            self._on_their_way.append((step, torch.tensor(loss), self.events[-1], False))
        return super().take(step, None, **settings)


def test_a_copy_is_not_waited_for():
    for late in (0, 1, 2, 5):
        arrivals, told = Late(late), []
        for step in range(20):
            new = arrivals.take(step, float(step))
            assert [each.step for each in new] == ([step - late] if step >= late else [])
            told += new
        assert not any(event.waited for event in arrivals.events)
        told += arrivals.take(19, None, wait=True)
        assert told == [ArrivedLoss(step, float(step)) for step in range(20)]  # all, in order


def test_what_never_comes_is_waited_for_after_ten_steps():
    arrivals = Late(10**9)
    told = [(step, each.step) for step in range(30) for each in arrivals.take(step, 1.0)]
    assert told == [(step, step - 10) for step in range(10, 30)]


def test_another_device_is_asked_one_step_later():
    arrivals = Arrivals()
    meta = type("Number", (), {"device": torch.device("meta"), "__float__": lambda self: 3.0})()
    arrivals._on_their_way.append((0, meta, None, False))
    assert arrivals.take(1, None) == []  # nothing newer was queued behind it
    arrivals._on_their_way.append((1, meta, None, False))
    assert arrivals.take(1, None) == [ArrivedLoss(0, 3.0)]


def walks():
    """Losses that fall, rise, stay, explode and turn negative."""
    noise = random(40, 300, seed=5).cumsum(-1)
    for k, walk in enumerate(noise):
        yield (2 + 0.1 * walk if k % 4 else torch.exp(0.3 * walk)).tolist()


def test_the_alarm_is_that_of_the_reports():
    """Step by step what `loss_alarm` says of the whole run."""
    went_off = 0
    for losses in walks():
        record, first = LossRecord(), None
        for step, loss in enumerate(losses):
            record.add(ArrivedLoss(step, loss))
            first = step if first is None and record.alarmed else first
        expected = loss_alarm(losses)
        assert expected == (None if min(losses) < 0 else first) or min(losses) < 0
        assert min(losses) >= 0 or first is None or first < next(k for k, loss in enumerate(losses) if loss < 0)
        went_off += expected is not None
    assert 5 < went_off < 35
