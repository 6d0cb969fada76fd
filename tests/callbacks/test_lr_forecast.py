"""The schedule is looked ahead on a copy: what it says is what the run then does, and nothing moves."""

import copy
import logging
import math

import pytest
import torch
from harness import Losses, Model, Rows, data, fit
from schedules import SCHEDULES, Scheduled
from torch.optim import SGD, lr_scheduler

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.lr_forecast import Schedule
from lsp_callbacks.step.flat import largest_learning_rate

KEY, AHEAD = "stability/courant", "stability/steps_to_edge"


class Look(Losses):
    """Looks ahead after every batch, and notes what really came."""

    def __init__(self, horizon=9):
        super().__init__()
        self.horizon, self.said, self.used = horizon, [], []

    def on_train_start(self, trainer, pl_module):
        self.schedule = Schedule(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.used.append(largest_learning_rate(trainer.optimizers[0]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]
        self.said.append(self.schedule.ahead(len(self.used), self.horizon))
        after = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        assert [b | {"_get_lr_called_within_step": 0} for b in before] == [
            a | {"_get_lr_called_within_step": 0} for a in after
        ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_said_is_what_comes(name):
    make, settings = SCHEDULES[name]
    look = Look()
    fit(lambda: Scheduled(make, **settings), look, max_epochs=5, max_steps=-1)  # of 6 steps
    assert len(look.used) == 30
    for k, said in enumerate(look.said):
        real = look.used[k + 1 : k + 1 + look.horizon]
        assert said[: len(real)] == pytest.approx(real, rel=1e-9), k
    assert len(set(look.used)) > 1 or name == "plateau"


def test_a_rate_that_was_set_by_hand_is_noticed():
    class ByHand(Look):
        def on_train_batch_end(self, trainer, *args):
            if len(self.used) == 4:
                trainer.optimizers[0].param_groups[0]["lr"] = 7.0
            super().on_train_batch_end(trainer, *args)

    look = ByHand(horizon=3)
    fit(Model, look, max_steps=8)
    assert look.said[2] != [7.0] * 3 and look.said[3] == look.said[5] == [7.0] * 3


def jumping(factor, at):
    return lambda: Scheduled(lambda m, o: lr_scheduler.LambdaLR(o, lambda step: factor if step >= at else 1.0), lr=0.01)


def watched(factor, **settings):
    monitor, rows = StabilityMonitor(["sgd_stability"], every_n_steps=3), Rows()
    stop, losses = StopOnInstability(**settings), Losses()
    fit(jumping(factor, 14), monitor, stop, losses, logger=rows, max_epochs=5, max_steps=-1, log_every_n_steps=1)
    return monitor, stop, losses, rows


def test_a_jump_is_foreseen_announced_and_not_taken(caplog):
    with caplog.at_level(logging.INFO):
        monitor, stop, losses, rows = watched(1e6)
    steps = monitor.history[AHEAD].steps
    # At step s the first step at the new rate, 14, is 14 - s ahead.
    assert monitor.history[AHEAD].values == [14 - s for s in steps] and steps[0] <= 6
    assert rows.curve(AHEAD) == dict(zip(steps, monitor.history[AHEAD].values))
    assert stop.event_step == stop.stop_step == 13 and len(losses.losses) == 14  # step 14 never ran
    assert f"at step {steps[0] + 14 - steps[0]}" in caplog.text and "was not used" in caplog.text


def test_without_a_limit_it_is_announced_and_taken():
    _, stop, losses, _ = watched(170, limit=None, confirm=None, patience=99)
    assert stop.event_step == 13 and stop.stop_step is None and len(losses.losses) == 30


def test_a_rate_that_stays_below_the_edge_has_no_crossing():
    monitor, stop, _, _ = watched(1.5)
    assert AHEAD not in monitor.history and stop.event_step is None
    assert max(monitor.history[KEY].values) < 1


def test_the_scheduled_number_is_the_measured_one_at_the_measured_rate():
    seen = []

    class See(Losses):
        def on_train_batch_end(self, trainer, *args):
            seen.append(monitor.scheduled_courant(trainer))

    monitor = StabilityMonitor(["sgd_stability"], every_n_steps=50)
    fit(
        lambda: Model(optimizer=lambda p: SGD(p, lr=0.02)),
        monitor,
        See(),
        loader=data(n=16),
        max_epochs=5,
        max_steps=-1,
    )
    (first,) = monitor.history[KEY].values
    measured = monitor.history[KEY].steps[0]
    assert all(map(math.isnan, seen[:measured]))
    assert seen[measured:] == pytest.approx([first] * len(seen[measured:]))


def test_the_rates_of_now_and_of_the_last_measured_step_are_known_unless_processes_differ():
    seen, rates = [], []

    class See(Losses):
        def on_train_batch_end(self, trainer, *args):
            seen.append(monitor.rates())

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    monitor = StabilityMonitor(["sgd_stability"], every_n_steps=4)
    fit(lambda: Scheduled(SCHEDULES["warm-up, then cosine"][0]), monitor, See(), max_epochs=3, max_steps=-1)
    assert len(set(rates)) == 18 and [now for now, _ in seen[:-1]] == rates[1:]
    assert [seen[step][1] for step in monitor.history[KEY].steps] == [
        rates[step] for step in monitor.history[KEY].steps
    ]
    assert len(monitor.history[KEY].steps) > 2
    monitor._loss_feed.has_same_rates = False
    assert all(map(math.isnan, monitor.rates()))
    monitor._loss_feed.has_same_rates, monitor.forecast._optimizer = True, None  # players have rates of their own
    assert all(map(math.isnan, monitor.rates()))


def test_no_optimizer_or_schedule_is_touched():
    """Bit-identical with the look-ahead, the schedule's own state included."""
    left = []
    for callbacks in ([], [StabilityMonitor(["sgd_stability"], every_n_steps=2)]):
        make, _ = SCHEDULES["warm-up, then cosine"]
        trainer = fit(lambda make=make: Scheduled(make), *callbacks, max_epochs=4, max_steps=-1)
        left.append((trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()))
    (a, first), (b, second) = left
    assert a["param_groups"] == b["param_groups"]
    assert all(torch.equal(a["state"][k]["momentum_buffer"], b["state"][k]["momentum_buffer"]) for k in a["state"])
    assert first["_last_lr"] == second["_last_lr"] and first["last_epoch"] == second["last_epoch"] == 24
    inner = [[s["last_epoch"] for s in own["_schedulers"]] for own in (first, second)]
    assert inner[0] == inner[1]
