"""The Courant number of steps as they were taken: its value, what it is measured on, and when there is none."""

import copy
import math
from functools import partial
from itertools import accumulate

import harness
import optimizer_zoo
import pytest
import pytorch_lightning as pl
import torch
from harness import FEATURES, Model, data, fit, mlp, unchanged
from problems import Quadratic, close, dense_hessian, freeze, regression, symmetric, take, trajectory
from scipy.integrate import quad
from torch import nn, optim
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lsp_callbacks import CourantStep, Monitor, Snapshot, StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import courant_step
from lsp_callbacks.loops import Watch

KEY = "stability/courant_step"


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def measured(problem, optimizer, steps=2, **settings):
    """The number after some steps, each of which is looked at."""
    metric = CourantStep(**settings)
    for step in range(steps):
        metric.update(freeze(problem, optimizer, step=step))
        take(optimizer, problem())
        metric.after_update()
    return float(metric.compute()[KEY])


@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.5, 2.0])
def test_gradient_descent_on_a_quadratic_in_closed_form(lr):
    problem = Quadratic(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    problem.parts[0].data = torch.ones(2, dtype=torch.float64)  # g = (1, 4), g^T H g = 65, ||g||^2 = 17
    close(measured(problem, optim.SGD(problem.parameters(), lr=lr), 1), lr * 65 / 34, 1e-9)


def test_several_steps_are_a_ratio_of_sums():
    H = symmetric([3.0, 1.0, 0.2], seed=2)
    problem = Quadratic(H)
    heavy_ball = optim.SGD(problem.parameters(), lr=0.5, momentum=0.95)
    metric, curvatures, slopes = CourantStep(readings=7), [], []
    for step in range(40):
        metric.update(freeze(problem, heavy_ball, step=step))
        theta = flat(problem.parameters())
        take(heavy_ball, problem())
        u = flat(problem.parameters()) - theta
        curvatures.append(u @ H @ u), slopes.append((H @ theta) @ u)
        expected = sum(curvatures[-7:]) / (-2 * sum(slopes[-7:]))
        if expected > 0:
            metric.after_update()
            close(metric.compute()[KEY], expected, 1e-9)
        else:
            with pytest.raises(Unmeasurable, match="uphill"):
                metric.after_update()
    assert sum(slope > 0 for slope in slopes) > 5  # momentum goes uphill in some of them


OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.3), "momentum": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": partial(optim.AdamW, lr=0.03, weight_decay=0.1), "Rprop": partial(optim.Rprop, lr=0.03),
    "NAdam": partial(optim.NAdam, lr=0.02), "Adafactor": partial(optim.Adafactor, lr=0.05),
    "RAdam": partial(optim.RAdam, lr=0.1), "Adamax": partial(optim.Adamax, lr=0.02),
    "Adadelta": partial(optim.Adadelta, lr=1.0), "ASGD": partial(optim.ASGD, lr=0.3),
    "Lion": partial(optimizer_zoo.Lion, lr=0.01), "Sophia": partial(optimizer_zoo.Sophia, lr=0.01),
    "schedule-free": partial(optimizer_zoo.ScheduleFree, lr=0.3), "8 bits": partial(optimizer_zoo.EightBit, lr=0.1),
    "Lookahead": lambda p: optimizer_zoo.Lookahead(optim.SGD(p, lr=0.1, momentum=0.9)),
    "Muon, AdamW": optimizer_zoo.matrices_and_rest(partial(optim.Muon, lr=0.02), partial(optim.AdamW, lr=0.02)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_curvature_along_the_update_of_any_optimizer(name):
    """Twice the integral of ``(1 - s) u^T H(theta + s u) u``, by SciPy and dense Hessians."""
    problem = regression()
    optimizer = OPTIMIZERS[name](problem.parameters())
    for _ in range(3):
        take(optimizer, problem())
    twin, (gradient,) = copy.deepcopy(problem), [flat(torch.autograd.grad(problem(), list(problem.parameters())))]
    value = measured(problem, optimizer, 1)
    theta = flat(twin.parameters())
    u = flat(problem.parameters()) - theta

    def curvature(s):
        nn.utils.vector_to_parameters(theta + s * u, twin.parameters())
        return float(u @ dense_hessian(twin) @ u)

    slope = float(gradient @ u)
    along, error = quad(lambda s: 2 * (1 - s) * curvature(s), 0, 1, epsrel=1e-8)
    assert slope < 0 and error < 1e-6 * abs(along)
    close(value, along / (-2 * slope), 1e-6)
    if name == "SGD":  # short steps: the Hessian at their beginning, by brute force
        short = regression()
        H, g = dense_hessian(short), flat(torch.autograd.grad(short(), list(short.parameters())))
        close(measured(short, optim.SGD(short.parameters(), lr=1e-4), 1) / 1e-4, g @ H @ g / (2 * g @ g), 1e-3)


def test_the_function_is_nan_where_the_loss_does_not_fall():
    assert courant_step(torch.tensor([-1.0, 2.0]), torch.tensor([0.1, 0.1])).isnan()
    close(courant_step(torch.tensor([-1.0, -3.0]), torch.tensor([-0.5, 1.5])), 1.25, 1e-6)


# -- steps as they are trained ---------------------------------------------------------------------------------------


class Noisy(Model):
    """Dropout and BatchNorm: another loss for other masks, or for running statistics."""

    def __init__(self, optimizer):
        super().__init__(nn.Sequential(nn.BatchNorm1d(FEATURES), mlp(nn.Dropout(0.4), width=20)), optimizer)


class ByHand(pl.Callback):
    """The same number, by a deep copy of the module and of the random state from before each batch."""

    def __init__(self):
        self.readings, self.batches, self.is_seen = [], [], False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        logged, module.log, held = module.log, lambda *_: None, module._trainer
        module._trainer = None
        self.batches.append((copy.deepcopy(module), torch.get_rng_state(), batch))
        module.log, module._trainer = logged, held

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not self.is_seen:  # the first evaluation of a step that makes several
            self.gradient, self.theta = flat(p.grad for p in module.parameters()), flat(module.parameters())
        self.is_seen = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.batches) < trainer.accumulate_grad_batches:
            return
        state, now = torch.get_rng_state(), flat(module.parameters())
        losses = []
        for theta in (self.theta, now):
            twin, total = self.batches[0][0], 0.0
            twin = copy.deepcopy(twin)
            nn.utils.vector_to_parameters(theta, twin.parameters())
            for _, random, part in self.batches:
                torch.set_rng_state(random)
                total += float(twin.loss(part).detach().double()) / len(self.batches)
            losses.append(total)
        torch.set_rng_state(state)
        slope = float(self.gradient.double() @ (now - self.theta).double())
        self.readings.append(1 + (losses[1] - losses[0]) / -slope)
        self.batches, self.is_seen = [], False


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}])
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(optim.SGD, lr=1.5),
        partial(optim.Adamax, lr=0.05),
        partial(optimizer_zoo.SAM, lr=1.0),
        partial(optim.LBFGS, lr=0.5, max_iter=3),
    ],
)
def test_masks_statistics_accumulation_and_clipping_are_those_of_the_step(optimizer, settings):
    by_hand = ByHand()
    monitor = StabilityMonitor([CourantStep(readings=1)], every_n_steps=1, strict=True)
    fit(partial(Noisy, optimizer), by_hand, monitor, max_steps=6, **settings)
    curve = monitor.history[KEY]
    assert curve.steps == list(range(6))  # each step, and no window of two
    close(curve.values, by_hand.readings, 0.02)
    close(sum(curve.values), sum(by_hand.readings), 0.01)


@pytest.mark.parametrize("every", [1, 2, None])
def test_it_leaves_training_unchanged(every):
    make = partial(Noisy, partial(optim.RMSprop, lr=0.05))
    unchanged(make, StabilityMonitor(["sharpness", "courant_step"], every_n_steps=every), max_steps=8)


def test_it_is_part_of_the_observation_of_its_step():
    rows = harness.Rows()
    monitor = StabilityMonitor(["sharpness", "courant_step"], every_n_steps=2)
    fit(Model, monitor, logger=rows, max_steps=6)
    assert monitor.history[KEY].steps == monitor.history["stability/sharpness"].steps == [0, 2, 4]
    assert [KEY in row for _, row in rows.rows if "stability/sharpness" in row] == [True] * 3


def test_a_plain_loop_sees_the_update_where_it_is_made():
    torch.manual_seed(0)
    net, watched = mlp(), []
    sgd = optim.SGD(net.parameters(), lr=0.5)
    loss_fn = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    log = lambda values, step: watched.append((step, values[KEY]))  # noqa: E731
    watch = Watch(net, sgd, loss_fn, Monitor(CourantStep(readings=1), every_n_steps=2), log=log)
    expected = {}
    for step, batch in enumerate(watch(data(n=40))):
        sgd.zero_grad()
        before = loss_fn(net, batch)
        before.backward()
        squared = sum(float(p.grad.square().sum()) for p in net.parameters())
        sgd.step()
        expected[step] = 1 + float((loss_fn(net, batch) - before).detach()) / (0.5 * squared)
    assert [step for step, _ in watched] == [0, 2, 4]
    close([value for _, value in watched], [expected[step] for step, _ in watched], 1e-3)


def test_a_loss_that_depends_on_the_number_of_the_step_is_that_of_the_step():
    class Annealed(Model):
        def loss(self, batch):
            return super().loss(batch) * (1 + self.global_step)

    monitor = StabilityMonitor([CourantStep(readings=1)], every_n_steps=1, strict=True)
    fit(partial(Annealed, optimizer=partial(optim.SGD, lr=0.01)), monitor, max_steps=4)
    assert all(0 < value < 0.3 for value in monitor.history[KEY].values) and len(monitor.history[KEY].values) == 4


def test_a_loss_that_changes_from_step_to_step_by_itself_is_refused():
    problem, counter = regression(), [0]
    sgd = optim.SGD(problem.parameters(), lr=0.1)
    metric = CourantStep()
    metric.update(freeze(problem, sgd, replay=lambda: problem() * (1 + 0.1 * counter[0])))
    take(sgd, problem())
    counter[0], after = 1, flat(problem.parameters())
    with pytest.raises(Unmeasurable, match="step 0 is another one after its update"):
        metric.after_update()
    assert torch.equal(flat(problem.parameters()), after)


def test_several_updates_of_one_batch_give_no_reading():
    class Twice(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(self.loss(batch))
                self.optimizers().step()

    loss_fn = lambda module, batch: module.loss(batch)  # noqa: E731
    monitor = StabilityMonitor(["courant_step"], every_n_steps=1, loss_fn=loss_fn)
    fit(Twice, monitor, max_steps=6)
    assert KEY not in monitor.history


# -- where there is none ---------------------------------------------------------------------------------------------


def test_a_step_that_moves_nothing_gives_no_reading_and_holds_up_none():
    monitor, schedule = Monitor(CourantStep(readings=1), every_n_steps=1), [0.0, 0.1, 0.0, 0.0, 0.1]
    problem = regression()
    sgd = optim.SGD(problem.parameters(), lr=1.0)
    for step, lr in enumerate(schedule):
        sgd.param_groups[0]["lr"] = lr
        monitor.observe(freeze(problem, sgd, step=step))
        take(sgd, problem())
        observation = monitor.after_update()
        assert (observation is None) == (lr == 0) and not monitor.cadence.under_way
    assert monitor.history[KEY].steps == [1, 4] and not any(map(math.isnan, monitor.history[KEY].values))


@pytest.mark.parametrize(
    "optimizer, dtype, reason",
    [
        (partial(optim.SGD, lr=0.1, maximize=True), torch.float64, "first order .* change the loss by"),
        (partial(optim.SGD, lr=1e-7), torch.float32, "rounding hides it"),
        (partial(optim.SGD, lr=1e200), torch.float64, "not finite after its update"),
    ],
)
def test_what_cannot_be_known_is_nan_with_a_reason(optimizer, dtype, reason):
    problem = regression().to(dtype)
    with pytest.raises(Unmeasurable, match=reason):
        measured(problem, optimizer(problem.parameters()), 1)
    problem = regression().to(dtype)
    descent, monitor = optimizer(problem.parameters()), Monitor(CourantStep(), every_n_steps=1)
    monitor.observe(freeze(problem, descent))
    take(descent, problem())
    with pytest.warns(UserWarning, match=f"could not measure courant_step at step 0.*{reason}"):
        assert math.isnan(monitor.after_update().values[KEY])
    assert math.isnan(monitor.history[KEY].values[0])


def test_a_gradient_that_is_not_that_of_the_loss_is_refused():
    problem = regression()
    sgd = optim.SGD(problem.parameters(), lr=0.1)
    wrong = freeze(problem, sgd)
    wrong.gradient.update({name: 3 * g for name, g in wrong.gradient.items()})
    with pytest.raises(Unmeasurable, match="gradient is not that of its loss"):
        CourantStep().update(wrong)


def test_the_error_by_rounding_holds():
    """Against float64, over losses and rates from far above to the least that is accepted."""
    accepted = 0
    for seed in range(4):
        for lr in (1.0, 1e-2, 1e-3, 1e-4, 1e-5):
            values = []
            for dtype in (torch.float64, torch.float32):
                problem = regression(seed=seed).to(torch.float32).to(dtype)  # the same parameters
                metric, sgd = CourantStep(), optim.SGD(problem.parameters(), lr=lr)
                metric.update(freeze(problem, sgd))
                take(sgd, problem())
                try:
                    metric.after_update()
                except Unmeasurable:
                    continue
                values.append({key: float(value) for key, value in metric.compute().items()})
            if len(values) == 2:
                accepted += 1
                assert abs(values[1][KEY] - values[0][KEY]) <= values[1][f"{KEY}_error"] <= 0.1
    assert 12 <= accepted < 20


def test_half_precision_counts_as_half_precision():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.x = nn.Linear(8, 4), torch.randn(64, 8)

        def forward(self):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(self.x).float().square().mean()

    problem = Autocast()
    metric, sgd = CourantStep(), optim.SGD(problem.parameters(), lr=1.0)
    metric.update(freeze(problem, sgd))
    take(sgd, problem())
    metric.after_update()
    assert 1e-2 < float(metric.compute()[f"{KEY}_error"]) < 0.1
    with pytest.raises(Unmeasurable, match="rounding"):
        measured(problem, optim.SGD(problem.parameters(), lr=1e-2), 1)


def test_it_goes_on_from_a_checkpoint():
    problem = regression()
    adam = optim.RAdam(problem.parameters(), lr=0.05)
    whole, resumed = CourantStep(readings=4), CourantStep(readings=4)
    for k, snapshot in enumerate(trajectory(problem, adam, 8)):
        if k == 6:
            resumed.load_state_dict(whole.state_dict())
        (whole.update(snapshot), k >= 6 and resumed.update(snapshot))
    assert float(whole.compute()[KEY]) == float(resumed.compute()[KEY])


def test_a_gradient_scaler_that_leaves_a_step_out_gives_no_reading():
    net, watched = mlp(), []
    sgd, scaler = optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    loss_fn = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    watch = Watch(
        net, sgd, loss_fn, Monitor(CourantStep(readings=1), every_n_steps=1), scaler=scaler,
        log=lambda values, step: watched.append(values[KEY]),
    )  # fmt: skip
    for k, batch in enumerate(watch(data(n=40))):
        sgd.zero_grad()
        scaler.scale(loss_fn(net, batch)).backward()
        if k == 2:
            net[0].weight.grad.fill_(math.inf)
        scaler.unscale_(sgd)
        scaler.step(sgd)
        scaler.update()
    assert len(watched) == 4 and all(0 < value < 1 for value in watched)


@pytest.mark.parametrize("check_every", [1, 10**6])
def test_two_vectors_over_all_parameters_are_held_at_most(check_every):
    """Beside a large model there is room for no more: weights and gradient before the update, or weights after it."""
    net = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    x, metric = torch.randn(2, 512), CourantStep(check_every=check_every)
    sgd, size = optim.SGD(net.parameters(), lr=0.1), sum(p.numel() * p.element_size() for p in net.parameters())
    most = []
    for step in range(2):
        net.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        gradient = {name: p.grad for name, p in net.named_parameters()}
        snapshot = Snapshot(
            step, net, lambda: net(x).square().mean(), optimizer=sgd, loss=loss.detach(), gradient=gradient
        )
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            metric.update(snapshot)
            sgd.step()
            metric.after_update()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        most.append(max(live) / size)
    assert bool(metric.compute()[KEY].isfinite())
    assert max(most) < 2.1
    assert 0.9 < most[-1] / (sum(metric.memory(snapshot).values()) / size) < 1.1
