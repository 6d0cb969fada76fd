"""The protocol by which loops show their steps: a loop that calls it by hand measures what `Watch` does."""

import math

import pytest
import torch
from harness import MOMENTUM, data, mlp
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import Lyapunov, Monitor, Sharpness, Unmeasurable
from lsp_callbacks.loops import Watch
from lsp_callbacks.loops.plain_loop import PlainLoop
from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.monitor.gradient_check import GradientCheck
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.step_loss import StepLoss, loss_of

SHARPNESS, LYAPUNOV = "stability/sharpness", "stability/lyapunov"


def gradients_of(parameters):
    return {p: p.grad for p in parameters if p.grad is not None}


class ByHand(PlainLoop):
    """Shows its losses, as Lightning's loop does."""

    shows_losses = True


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network(*middle):
    torch.manual_seed(0)
    return mlp(*middle)


def train(*, steps=4, accumulate=1, told=1.0, change=None, strict=False, shows_losses=True, every=1, skip=()):
    """A loop that drives an observer, without any hook; returns the observer and what each step has completed."""
    model = network(nn.Dropout(0.2))
    optimizer = MOMENTUM(model.parameters())
    monitor = Monitor(Sharpness(), Lyapunov(window=1), every_n_steps=every, strict=strict)
    observer = StepObserver(monitor)
    loop = ByHand(model, RunContext(), cross_entropy, accumulate=accumulate)
    loop.shows_losses = shows_losses
    observer.begin_run(loop, [optimizer])
    torch.manual_seed(1)
    batches, completed = data(n=steps * accumulate * 8), []
    for number, batch in enumerate(batches):
        if number % accumulate == 0:
            optimizer.zero_grad()
        observer.begin_batch(batch, loop.loss, first=number % accumulate == 0)
        loss = loop.loss(model, batch)
        observer.loss(told * loss)
        loss.backward()
        if (number + 1) % accumulate:
            continue
        if observer.step in skip:
            observer.skip_update()
            observer.count(moved=False)
            continue
        observer.before_update(optimizer, coming_gradients=lambda: gradients_of(model.parameters()))
        if change is not None:
            change(model)
        observer.check_gradient("changed by hand", is_gone_allowed=False)
        optimizer.step()
        observer.count()
        completed.append(observer.after_update())
    return observer, completed


def curves(monitor):
    return {key: (curve.steps, curve.values) for key, curve in monitor.history.items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loop_by_hand_measures_what_watch_does(accumulate):
    """To the last bit: a loss that is shown is not compared by its gradient, and enters no number."""
    observer, _ = train(accumulate=accumulate)
    model = network(nn.Dropout(0.2))
    optimizer = MOMENTUM(model.parameters())
    monitor = Monitor(Sharpness(), Lyapunov(window=1), every_n_steps=1)
    watch = Watch(model, optimizer, cross_entropy, monitor, accumulate=accumulate)
    torch.manual_seed(1)
    for number, batch in enumerate(watch(data(n=4 * accumulate * 8))):
        if number % accumulate == 0:
            optimizer.zero_grad()
        (cross_entropy(model, batch) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
    assert curves(observer.monitor) == curves(monitor) and observer.step == watch.step == 4
    assert len(observer.monitor.history[SHARPNESS].steps) == 4 and LYAPUNOV in observer.monitor.history


def test_what_a_step_has_completed_is_given_once():
    observer, completed = train(every=2)
    steps = [observation.step for each in completed for observation in each.observations]
    assert steps == sorted(set(steps)) and {0, 2} <= set(steps)
    assert observer.after_update() == ([], None)


def test_a_loss_that_is_shown_must_be_that_of_the_replay():
    with pytest.raises(Unmeasurable, match="could not be replayed"):
        train(told=1.5, strict=True)
    observer, _ = train(told=1.5, strict=True, shows_losses=False)  # then the gradient is compared
    assert all(map(math.isfinite, observer.monitor.history[SHARPNESS].values))


def test_listeners_are_given_each_step_that_was_observed():
    seen = []
    observer, _ = train(steps=1)
    model, optimizer = observer.loop.module, MOMENTUM(observer.loop.module.parameters())
    observer.listeners.append(
        lambda snapshot: seen.append((snapshot.step, len(observer.monitor.history[SHARPNESS].steps)))
    )
    for batch in data(n=16):
        observer.begin_batch(batch, observer.loop.loss, first=True)
        observer.loss(loss := observer.loop.loss(model, batch))
        loss.backward()
        observer.before_update(optimizer)
        observer.count()
    assert seen == [(1, 2), (2, 3)]  # after the monitor


def test_a_skipped_step_is_not_measured_and_moves_nothing():
    observer, _ = train(steps=6, skip=(2,))
    history = observer.monitor.history
    assert history[SHARPNESS].steps == [0, 1, 3, 4, 5] and observer.step == 6
    assert observer.previous == 5
    observer, _ = train(steps=3, skip=(2,))
    assert (observer.step, observer.previous) == (3, 1) and not observer.is_pending


def test_a_changed_gradient_invalidates_what_depends_on_the_update():
    def change(model):
        next(model.parameters()).grad.mul_(0.5)

    with pytest.warns(UserWarning, match="changed by hand"):
        observer, completed = train(change=change)
    history = observer.monitor.history
    assert all(map(math.isfinite, history[SHARPNESS].values)) and len(history[SHARPNESS].steps) == 4
    assert LYAPUNOV not in history or all(map(math.isnan, history[LYAPUNOV].values))
    assert math.isnan(history["stability/courant_gd"].values[0])
    assert math.isnan(completed[0].observations[0].values["stability/courant_gd"])


@pytest.mark.parametrize("by_some", [False, True])
def test_gradients_are_compared_once(by_some):
    p = nn.Parameter(torch.ones(2))
    p.grad, check = torch.tensor([1.0, math.nan]), GradientCheck(ErrorPolicy(strict=True))
    for gone, changed in ((True, False), (False, True)):
        check.expect(lambda: gradients_of([p]), by_some=by_some)
        assert not check.is_changed(is_gone_allowed=False)  # NaN equals NaN
        check.expect(lambda: gradients_of([p]), by_some=by_some)
        gradient, p.grad = p.grad, None
        assert check.is_changed(is_gone_allowed=gone) is changed
        assert not check.is_changed(is_gone_allowed=False)  # nothing is expected any more
        p.grad = gradient


@pytest.mark.parametrize("by_some", [False, True])
@pytest.mark.parametrize("change", [lambda g: g.mul_(0.99), lambda g: g.data.clamp_(-0.5, 0.5), lambda g: g.neg_()])
def test_a_gradient_that_is_changed_in_place_is_seen(change, by_some):
    p, check = nn.Parameter(torch.ones(20)), GradientCheck(ErrorPolicy(strict=True))
    p.grad = torch.randn(20, generator=torch.Generator().manual_seed(0))
    check.expect(lambda: gradients_of([p]), by_some=by_some)
    change(p.grad)
    assert check.is_changed(is_gone_allowed=False)


@pytest.mark.parametrize("by_some", [False, True])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_change_of_one_channel_or_row_of_large_gradients_is_seen(by_some, form):
    """Of 64 rows of 784 numbers and of 16 kernels, beside a gradient that is gone."""
    kernels = nn.Parameter(torch.ones(16, 32, 3, 3).to(memory_format=form))
    parameters = [nn.Parameter(torch.ones(64, 784)), nn.Parameter(torch.ones(9)), kernels]
    for changed in (None, (0, 5), (0, 63), (2, 0), (2, 11)):
        check = GradientCheck(ErrorPolicy(strict=True))
        for p in parameters:
            p.grad = torch.randn_like(p)
        check.expect(lambda: gradients_of(parameters), by_some=by_some)
        parameters[1].grad = None
        if changed is not None:
            parameters[changed[0]].grad.data[changed[1]] *= 0.5
        assert check.is_changed(is_gone_allowed=True) is (changed is not None)


# -- the loss of a step --------------------------------------------------------------------------------------------


def test_losses_are_summed_as_they_come():
    total = StepLoss()
    assert total.differentiated is None and total.returned is None
    for value in (0.1, 0.2, 0.3):
        total.begin_batch()
        loss = torch.tensor([value])
        total.add(loss)
        loss.zero_()  # in place, afterwards
        total.add_returned({"loss": torch.tensor(value, dtype=torch.bfloat16), "other": 1})
    exact = (torch.tensor(0.1) + torch.tensor(0.2)) + torch.tensor(0.3)
    assert total.differentiated == exact and total.differentiated.shape == () and not total.is_ambiguous
    assert total.returned.dtype == torch.float32
    assert total.returned == sum(torch.tensor(v, dtype=torch.bfloat16).float() for v in (0.1, 0.2, 0.3))
    total.average()
    assert float(total.differentiated) == pytest.approx(0.2)
    total.begin()
    assert total.differentiated is None and total.returned is None


def test_several_backward_passes_of_one_batch_are_ambiguous():
    total = StepLoss()
    for _ in range(2):
        total.begin_batch()
        total.add(torch.tensor(1.0))
    assert not total.is_ambiguous
    total.add(torch.tensor(1.0))
    assert total.is_ambiguous and total.differentiated == 3


@pytest.mark.parametrize("outputs, loss", [(1.0, 1.0), ({"loss": 2.0}, 2.0), ({}, None), (None, None)])
def test_the_loss_in_what_a_step_returns(outputs, loss):
    assert loss_of(outputs) == loss
    total = StepLoss()
    total.add_returned(outputs)  # no tensor: passed over
    assert total.returned is None
