"""Accumulated gradients: one step of several micro-batches is measured as the one step that it is."""

import math
from functools import partial

import pytest
import torch
from harness import (
    MEASURED,
    MOMENTUM,
    SGD,
    STOPPED,
    Model,
    Rows,
    convolutional,
    data,
    finite,
    fit,
    mlp,
    trainer,
    with_and_without,
)
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler
from schedules import SCHEDULES, Scheduled
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lsp_callbacks import Sharpness, StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.lr_forecast import Schedule
from lsp_callbacks.cli.diagram import examine
from lsp_callbacks.step.flat import largest_learning_rate

SHARPNESS, COURANT, LYAPUNOV = "stability/sharpness", "stability/courant_gd", "stability/lyapunov"


def run(accumulate, batch, *callbacks, make=MOMENTUM, **settings):
    monitor = StabilityMonitor(every_n_steps=2, window=1)
    loader = data(batch_size=batch, shuffle=False, dtype=torch.float64)
    trainer = fit(
        lambda: Model(optimizer=make).double(), monitor, *callbacks, loader=loader,
        accumulate_grad_batches=accumulate, **settings,
    )  # fmt: skip
    return trainer, monitor


@pytest.mark.parametrize("make", [SGD, MOMENTUM])
def test_two_halves_are_measured_as_the_whole(make):
    (half, halves), (one, whole) = run(2, 8, make=make), run(1, 16, make=make)
    for a, b in zip(half.model.parameters(), one.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert half.global_step == one.global_step == halves.step == whole.step == 10
    assert (
        halves.history.keys() == whole.history.keys() >= {SHARPNESS, COURANT, LYAPUNOV, "stability/courant_mean_square"}
    )
    for key, curve in whole.history.items():
        assert halves.history[key].steps == curve.steps
        if not key.endswith("_error"):
            # The critical rate is found by a search to 1e-3; what is drawn after it depends on how far that went.
            drawn = "critical" in key or key in ("stability/courant", "stability/courant_sgd", "stability/sgd_lyapunov")
            tolerance = 1e-2 if drawn else 1e-6
            assert halves.history[key].values == pytest.approx(curve.values, rel=tolerance, abs=1e-9), key
    assert whole.history[SHARPNESS].steps == [0, 2, 4, 6, 8]


def test_bit_identical_with_a_short_last_window_batch_norm_and_dropout():
    """Six batches make a window of four and one of two. Replays are compared with the step to the last bit."""
    monitor = with_and_without(lambda: Model(mlp(nn.BatchNorm1d(5), nn.Dropout(0.3))), accumulate_grad_batches=4)
    for key in (SHARPNESS, COURANT, LYAPUNOV, "stability/spectral_norm_max", "stability/courant_sgd"):
        assert finite(monitor, key), key
    assert monitor.step == 10 and len(monitor.history[SHARPNESS].steps) == 5
    monitor = with_and_without(lambda: Model(convolutional()), accumulate_grad_batches=2)
    assert finite(monitor, SHARPNESS) and finite(monitor, "stability/residual_stiffness_max")


@pytest.mark.parametrize("name", ["counter", "appends", "spectral_norm_hook", "owngenerators", "inplacebatch"])
def test_what_a_micro_batch_leaves_in_the_module_is_there_for_the_next(name):
    monitor = with_and_without((MEASURED | STOPPED)[name], accumulate_grad_batches=4)
    assert (finite(monitor, SHARPNESS) and finite(monitor, LYAPUNOV)) == (name in MEASURED)


class Before(Callback):
    """The weights before each step, and its micro-batches."""

    def __init__(self):
        self.weights, self.batches = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.net.named_parameters()})
        self.batches.append([])

    def on_before_backward(self, trainer, pl_module, loss):
        self.batches[-1].append(self.batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch


def test_a_short_last_window_is_divided_as_the_others(monkeypatch):
    from lsp_callbacks.quantities.curvature import sharpness as settings

    for name, value in (("_TOLERANCE", 1e-9), ("_BOUNDED_WARM", 80), ("_BOUNDED_COLD", 80)):
        monkeypatch.setattr(settings, name, value)
    before, monitor = Before(), StabilityMonitor([Sharpness(bounded=True)], every_n_steps=1)
    net = nn.Linear(6, 3).double()
    loader = data(shuffle=False, dtype=torch.float64)
    fit(Model(net), before, monitor, loader=loader, accumulate_grad_batches=4, max_steps=4)
    assert [len(batches) for batches in before.batches] == [4, 2, 4, 2]
    for weights, batches, value in zip(before.weights, before.batches, monitor.history[SHARPNESS].values):

        def loss(flat, batches=batches, weights=weights):
            parts = flat.split([p.numel() for p in weights.values()])
            own = {n: part.view_as(p) for (n, p), part in zip(weights.items(), parts)}
            return sum(F.cross_entropy(functional_call(net, own, (x,)), y) for x, y in batches) / 4

        hessian = torch.autograd.functional.hessian(loss, torch.cat([p.reshape(-1) for p in weights.values()]))
        assert value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-6)


class Skips(Model):
    """Some micro-batches have no loss; buffers and random numbers move all the same."""

    def __init__(self, without):
        super().__init__(mlp(nn.BatchNorm1d(5), nn.Dropout(0.2)))
        self.without = without

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return None if batch_idx in self.without else loss


@pytest.mark.parametrize("without, steps", [((1, 2), (0, 1, 2)), ((0, 1), (1, 2)), ((5,), (0, 1, 2))])
def test_micro_batches_without_a_loss(without, steps):
    """Windows of two: one of them without any loss moves nothing, but Lightning counts it."""
    rows, monitor = Rows(), StabilityMonitor(["sharpness", "lyapunov"], every_n_steps=1, window=1)
    settings = {"logger": rows, "max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 2}
    run = fit(lambda: Skips(without), monitor, **settings)
    assert monitor.step == run.global_step == 9
    assert monitor.history[SHARPNESS].steps == [3 * epoch + step for epoch in range(3) for step in steps]
    assert finite(monitor, SHARPNESS) and finite(monitor, LYAPUNOV)


def test_a_window_cut_by_the_end_of_the_epoch_is_forgotten():
    class Leaves(Model):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    monitor = StabilityMonitor(["sharpness"], every_n_steps=1, strict=True)
    fit(Leaves, monitor, max_epochs=3, max_steps=-1, accumulate_grad_batches=2)
    assert monitor.history[SHARPNESS].steps == [0, 1, 2]


def test_the_accumulation_may_change_between_epochs():
    monitor = StabilityMonitor(["sharpness", "sgd_stability"], every_n_steps=1)
    scheduler = GradientAccumulationScheduler({0: 3, 1: 2})
    trainer = fit(partial(Model), monitor, scheduler, max_epochs=2, max_steps=-1)
    assert monitor.history[SHARPNESS].steps == [*range(5)] and trainer.global_step == 5
    assert finite(monitor, SHARPNESS) and finite(monitor, "stability/courant_sgd")


def test_a_sub_batch_is_of_all_micro_batches():
    with pytest.warns(UserWarning, match="sub-batch"):
        monitor = StabilityMonitor(["sharpness"], every_n_steps=1, sub_batch=8)
        fit(Model, monitor, loader=data(shuffle=False), accumulate_grad_batches=2, max_steps=1)
    small = data(shuffle=False)
    first = [torch.cat([t[:4], t[8:12]]) for t in small.dataset.tensors]
    small = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*first), batch_size=8)
    direct = StabilityMonitor(["sharpness"], every_n_steps=1)
    fit(Model, direct, loader=small, max_steps=1)
    assert monitor.history[SHARPNESS].values == pytest.approx(direct.history[SHARPNESS].values, rel=1e-3)


# -- what counts by steps ------------------------------------------------------------------------------------------


class Look(Callback):
    """Looks ahead at the end of each window, and notes what really came."""

    def __init__(self, horizon=7):
        self.horizon, self.said, self.used = horizon, [], []

    def on_train_start(self, trainer, pl_module):
        self.schedule = Schedule(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used.append(largest_learning_rate(optimizer))

    def on_train_batch_end(self, trainer, *args):
        if not trainer.fit_loop._should_accumulate():
            self.said.append(self.schedule.ahead(len(self.used), self.horizon))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_schedule_is_looked_ahead_by_steps(name, accumulate):
    make, settings = SCHEDULES[name]
    look = Look()
    fit(lambda: Scheduled(make, **settings), look, max_epochs=6, max_steps=-1, accumulate_grad_batches=accumulate)
    assert len(look.said) == len(look.used) == {2: 18, 4: 12}[accumulate]
    for k, said in enumerate(look.said):
        real = look.used[k + 1 : k + 1 + look.horizon]
        assert said[: len(real)] == pytest.approx(real, rel=1e-9), k


def test_stopping_judges_each_step_once_by_the_loss_of_its_window():
    judged = []

    class Judge(StopOnInstability):
        def judge(self, trainer, step, told):
            judged.append((step, told))
            return super().judge(trainer, step, told)

    run(2, 8, Judge(), max_steps=6)
    halves, judged = judged, []
    run(1, 16, Judge(), max_steps=6)
    assert [step for step, _ in halves] == [*range(6)]
    told, whole = ([each for _, arrived in steps for each in arrived] for steps in (halves, judged))
    assert [each.step for each in told] == [each.step for each in whole] == [*range(6)]
    assert [each.loss for each in told] == pytest.approx([each.loss for each in whole], rel=1e-9)
    assert not any(each.left_out or math.isnan(each.loss) for each in told)


def test_the_diagram_before_training_is_that_of_the_whole_window():
    found = []
    for accumulate, size in ((2, 8), (1, 16)):
        torch.manual_seed(0)
        model = Model(optimizer=partial(torch.optim.Adam, lr=1e-2)).double()
        loader = data(batch_size=size, shuffle=False, dtype=torch.float64)
        found.append(examine(trainer(accumulate_grad_batches=accumulate), model, train_dataloaders=loader))
    halves, whole = found
    assert halves.batch_size == whole.batch_size == 16
    # Adam's preconditioner comes from the gradient of the step.
    assert float(halves.modes.trace) == pytest.approx(float(whole.modes.trace), rel=1e-6)
