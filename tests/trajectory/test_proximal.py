"""Maps of the weights after the step: their derivatives, the whole update, the promises, and whether they are met."""

import math

import pytest
import pytorch_lightning as pl
import torch
from harness import Model, fit, mlp, unchanged
from problems import Quadratic, close, f64, freeze, random, regression, symmetric, take, trajectory
from torch import nn

from lsp_callbacks import LyapunovTrajectory, Monitor, ProximalStep, Sharpness, StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import (
    Box,
    MaxNorm,
    Only,
    Ridge,
    SoftThreshold,
    SpectralClip,
    proximal_bounds,
    proximal_gain,
)
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.loops import Watch
from lsp_callbacks.operators.trajectory.proximal import expected, proximal_jacobian, update, update_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import parameter_jacobian
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.flat import flatten

SGD = torch.optim.SGD
PROXES = {
    "box": Box(-0.2, 0.25),
    "nonnegative": Box(0.0),
    "max_norm": MaxNorm(0.4),
    "soft_threshold": SoftThreshold(0.8),
    "spectral": SpectralClip(0.5),
    "ridge": Ridge(0.7),
    "only": Only("net.0.*", Box(-0.1, 0.1)),
    "users": lambda name, tensor, lr: (1 + lr) * tensor.sin(),
}


def apply(task, optimizer, prox):
    with torch.no_grad():
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in task.named_parameters():
            p.copy_(prox(name, p, groups[id(p)]["lr"]))


def weights(task):
    return torch.cat([p.detach().reshape(-1) for p in task.parameters()])


def test_what_each_named_one_does():
    x = torch.tensor([[3.0, -4.0], [0.3, 0.4]], dtype=f64)
    close(Box(-1, 2)("w", x, 0.1), [[2.0, -1.0], [0.3, 0.4]], 1e-15)
    close(Box(0)("w", x, 0.1), [[3.0, 0.0], [0.3, 0.4]], 1e-15)
    close(MaxNorm(1)("w", x, 0.1), [[0.6, -0.8], [0.3, 0.4]], 1e-15)
    close(SoftThreshold(5)("w", x, 0.1), [[2.5, -3.5], [0.0, 0.0]], 1e-15)
    close(Ridge(5)("w", x, 0.1), x / 1.5, 1e-15)
    clipped = SpectralClip(1)("w", x, 0.1)
    u, s, v = torch.linalg.svd(x)
    close(clipped, u @ torch.diag(s.clamp(max=1)) @ v, 1e-14)
    for prox in (MaxNorm(1), SpectralClip(1)):
        assert torch.equal(prox("b", x[0], 0.1), x[0]) and float(prox.penalty("w", x)) == math.inf
        assert float(prox.penalty("w", prox("w", x, 0.1))) == 0
    # The proximal map is the least of lr R(y) + |y - x|^2 / 2.
    generator = torch.Generator().manual_seed(0)
    for prox in (Box(-1, 2), MaxNorm(1), SoftThreshold(5), SpectralClip(1), Ridge(5)):
        y = prox("w", x, 0.1)
        value = lambda z, prox=prox: 0.1 * float(prox.penalty("w", z)) + float((z - x).square().sum()) / 2  # noqa: E731
        for _ in range(50):
            z = y + 0.3 * torch.randn(2, 2, dtype=f64, generator=generator)
            assert value(prox("w", z, 0.0 if isinstance(prox, SoftThreshold | Ridge) else 0.1)) >= value(y) - 1e-9
    for bad in (lambda: Box(1, 0), lambda: MaxNorm(0), lambda: SoftThreshold(-1), lambda: SpectralClip(0)):
        with pytest.raises(ValueError, match=r"low|limit|strength"):
            bad()


@pytest.mark.parametrize("name", PROXES)
@pytest.mark.parametrize("kind, settings", [(SGD, {"lr": 0.2, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.05})])
def test_the_tangent_of_the_whole_update_against_real_steps(name, kind, settings):
    """Central differences of the real step and the real prox, from displaced weights."""
    prox, task = PROXES[name], regression()
    optimizer = kind(task.parameters(), **settings)
    for _ in range(2):
        take(optimizer, task())
    snapshot = freeze(task, optimizer, prox=prox)
    A = update_jacobian(snapshot, method="exact")
    start, state = weights(task), [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    direction = random(len(start), seed=4)

    def moved(e):
        nn.utils.vector_to_parameters(start + e * direction, task.parameters())
        for own, saved in zip(optimizer.state.values(), state):
            own.update({k: v.clone() for k, v in saved.items()})
        take(optimizer, task())
        apply(task, optimizer, prox)
        return weights(task)

    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    nn.utils.vector_to_parameters(start, task.parameters())
    z = torch.zeros(A.shape[1], dtype=f64)
    z[: len(start)] = direction
    close((A @ z)[: len(start)], difference, 1e-6)
    close(start + update(snapshot), moved(0.0), 1e-12)
    D = proximal_jacobian(snapshot)
    assert torch.equal(D.dense().T.contiguous(), D.T.dense()) or close(D.dense().T, D.T.dense(), 1e-12) is None


@pytest.mark.parametrize("clipping", [None, Clipping(0.05), Clipping(0.02, "value")])
@pytest.mark.parametrize(
    "kind, settings",
    [
        (SGD, {"lr": 0.2, "weight_decay": 0.1}),
        (SGD, {"lr": 0.2, "momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"lr": 0.05}),
    ],
)
def test_the_gain_is_the_norm_of_the_dense_product(kind, settings, clipping):
    task, prox = regression(), Box(-0.2, 0.25)
    optimizer = kind(task.parameters(), **settings)
    for _ in range(2):
        take(optimizer, task())
    snapshot = freeze(task, optimizer, prox=prox, clipping=clipping)
    A, D = parameter_jacobian(snapshot, method="exact"), proximal_jacobian(snapshot)
    close(A.dense().T, A.T.dense(), 1e-10)
    n = A.shape[0]
    whole = update_jacobian(snapshot, method="exact").dense()[:n, :n]
    close(D.dense() @ A.dense(), whole, 1e-10)
    close(proximal_gain(A, D, steps=60, tol=1e-12).value, torch.linalg.matrix_norm(whole, 2), 1e-6)
    for one, dense in ((prox, whole), (None, A.dense())):
        metric = ProximalStep(method="exact")
        metric.update(freeze(task, optimizer, prox=one, clipping=clipping))
        least, truth = float(metric.compute()["stability/prox_gain"]), float(torch.linalg.matrix_norm(dense, 2))
        assert 0.93 * truth <= least <= truth * (1 + 1e-6)  # four products from a random start


def measured(task, prox=None, lr=0.3, **settings):
    metric = ProximalStep(steps=10, method="exact")
    metric.update(freeze(task, SGD(task.parameters(), lr=lr, **settings), prox=prox))
    return {key.removeprefix("stability/prox_"): float(value) for key, value in metric.compute().items()}, metric


def test_what_is_promised_of_convex_losses_holds_and_of_others_is_refused():
    convex, saddle = Quadratic(symmetric([4.0, 1.0, 0.5])), Quadratic(symmetric([4.0, 1.0, -0.5]))
    for prox in (None, Box(-0.3, 0.3), SoftThreshold(0.2), MaxNorm(0.1), Ridge(0.7)):
        values, metric = measured(convex, prox)
        assert values["gain"] <= values["gain_bound"] + 1e-6 <= 1 + 2e-6 and metric.refused is None
    close(measured(convex)[0]["gain_bound"], 0.85, 1e-6)
    close(measured(convex, Ridge(0.7))[0]["gain_bound"], 0.85 / 1.21, 1e-6)
    values, metric = measured(convex, lr=0.6)
    assert "gain_bound" not in values and "rate" in metric.refused
    close(values["gain"], 1.4, 1e-6)
    values, metric = measured(saddle)
    assert "gain_bound" not in values and "not convex" in metric.refused
    close(values["gain"], 1.15, 1e-6)  # the prox step is not nonexpansive there
    # A strongly convex R makes up for it (claim 8): 1.15 / 1.3.
    close(measured(saddle, Ridge(1.0))[0]["gain_bound"], 1.15 / 1.3, 1e-6)
    assert "gain_bound" not in measured(saddle, Ridge(0.4))[0]
    for settings, prox, reason in (
        ({"momentum": 0.9}, None, "momentum"),
        ({}, lambda name, tensor, lr: tensor.clamp(-1, 1), "R is not known"),
    ):
        values, metric = measured(convex, prox, **settings)
        assert set(values) == {"gain", "gain_residual"} and reason in metric.refused
    assert proximal_bounds(from_matrix(torch.eye(2)), 0.1).gain == pytest.approx(0.9)


def test_the_objective_descends_as_promised():
    """One parameter: L = a theta^2 / 2, R = s |theta|; theta+ = (1 - lr a) theta - lr s by hand."""
    a, s, lr, theta = 2.0, 0.3, 0.4, 1.5
    task = Quadratic(torch.tensor([[a]], dtype=f64))
    with torch.no_grad():
        task.parts[0].fill_(theta)
    values, _ = measured(task, SoftThreshold(s), lr=lr)
    after = (1 - lr * a) * theta - lr * s
    objective = lambda t: a * t * t / 2 + s * abs(t)  # noqa: E731
    close(values["descent"], (objective(theta) - objective(after)) / (after - theta) ** 2, 1e-12)
    close(values["descent_promised"], 1 / lr - a / 2, 1e-9)
    assert values["descent"] >= values["descent_promised"] - 1e-9
    # Not convex, and it descends; from outside of the box the objective is infinite, and nothing is said.
    saddle = Quadratic(symmetric([4.0, 1.0, -0.5]))
    values, _ = measured(saddle, SoftThreshold(0.2))
    assert values["descent"] >= values["descent_promised"] - 1e-9 > 0
    with torch.no_grad():
        saddle.parts[0].fill_(1.0)
    assert "descent" not in measured(saddle, Box(-0.3, 0.3))[0]
    decayed, _ = measured(saddle, SoftThreshold(0.2), weight_decay=0.5)
    close(decayed["descent_promised"], 1 / 0.3 - 4.5 / 2, 1e-6)
    assert decayed["descent"] >= decayed["descent_promised"] - 1e-9


def test_exponents_feel_the_prox():
    """In two independent directions: one is held by the box, the other grows at |1 - lr a|."""
    curvature = torch.diag(torch.tensor([-1.0, -20.0], dtype=f64))
    task = Quadratic(curvature, sizes=(1, 1))
    with torch.no_grad():
        task.parts[0].fill_(1e-9), task.parts[1].fill_(0.9)
    sgd, metric = SGD(task.parameters(), lr=0.1), LyapunovTrajectory(k=1, transient=2, window=40, method="exact")
    prox = Box(-1.0, 1.0)
    for snapshot in trajectory(task, sgd, 42, prox=prox):
        metric.update(snapshot)
        apply(task, sgd, prox)  # before the step of `trajectory`: of the step before
    close(metric.compute()["stability/lyapunov_trajectory"], math.log(1.1), 1e-6)
    free = LyapunovTrajectory(k=1, transient=2, window=40, method="exact")
    for snapshot in trajectory(task, sgd, 42):
        free.update(snapshot)
    close(free.compute()["stability/lyapunov_trajectory"], math.log(3.0), 1e-2)  # a finite time


def test_maps_without_a_derivative_are_refused():
    task = regression()
    sgd = SGD(task.parameters(), lr=0.1)
    for prox, reason in (
        (lambda name, tensor, lr: tensor.detach().clamp(-1, 1), "without a graph"),
        (lambda name, tensor, lr: tensor.sum(), "shape"),
        (lambda name, tensor, lr: (tensor - tensor).sqrt(), "not finite"),
    ):
        with pytest.raises(Unmeasurable, match=reason):
            D = proximal_jacobian(freeze(task, sgd, prox=prox))
            D @ torch.ones(D.shape[1], dtype=f64)
    held = expected(freeze(task, sgd, prox=Box(-0.1, 0.1)))
    assert not held.met()
    take(sgd, task())
    assert not held.met()
    apply(task, sgd, Box(-0.1, 0.1))
    assert held.met()
    assert flatten([p for p in task.parameters()], list(task.parameters())).abs().max() <= 0.1


# -- in training ---------------------------------------------------------------------------------------------------

CLIP = Box(-0.2, 0.2)


class InStep(Model):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        project(self)


class AtEnd(Model):
    def on_train_batch_end(self, *args):
        project(self)


class Hooked(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: project(self))
        return optimizer


class Projector(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        project(pl_module)


def project(module, limit=0.2):
    with torch.no_grad():
        for p in module.parameters():
            p.clamp_(-limit, limit)


UPDATE = ["sharpness", "lyapunov", "proximal_step"]
GAIN, SHARPNESS = "stability/prox_gain", "stability/sharpness"


@pytest.mark.parametrize("make", [InStep, AtEnd, Hooked])
@pytest.mark.parametrize("settings", [{}, {"sub_batch": 4}])
def test_wherever_the_map_is_applied_it_is_measured_and_training_unchanged(make, settings):
    monitor = StabilityMonitor(UPDATE, every_n_steps=2, window=2, prox=CLIP, **settings)
    unchanged(lambda: make(mlp(width=8)), monitor, max_steps=8)
    values = monitor.history[GAIN].values
    assert len(values) == 4 and all(map(math.isfinite, values)) and not monitor.monitor.skipped
    assert all(map(math.isfinite, monitor.history["stability/lyapunov"].values))


@pytest.mark.parametrize("order", [0, 1])
def test_a_callback_may_apply_it_in_either_order(order):
    monitor = StabilityMonitor(UPDATE, every_n_steps=1, window=2, prox=CLIP)
    callbacks = [Projector(), monitor] if order else [monitor, Projector()]
    fit(lambda: Model(mlp(width=8)), *callbacks, max_steps=4)
    assert all(map(math.isfinite, monitor.history[GAIN].values)) and not monitor.monitor.skipped


class Tighter(Model):
    def on_train_batch_end(self, *args):
        project(self, 0.1)


@pytest.mark.parametrize("make", [Model, Tighter])
def test_a_map_that_is_not_the_one_given_is_noticed(make):
    monitor = StabilityMonitor(UPDATE, every_n_steps=1, window=1, prox=CLIP)
    with pytest.warns(UserWarning, match=r"not prox\(step\)"):
        fit(lambda: make(mlp(width=8)), monitor, max_steps=3)
    assert set(monitor.monitor.skipped) >= {*UPDATE, "courant_gd", "sharpness_limit"} - {"sharpness"}
    assert "sharpness" not in monitor.monitor.skipped
    assert all(map(math.isfinite, monitor.history[SHARPNESS].values)) and len(monitor.history[SHARPNESS].values) == 3
    assert all(map(math.isnan, monitor.history[GAIN].values)) and len(monitor.history[GAIN].values) == 1


def test_without_it_an_own_optimizer_step_is_found_to_lead_elsewhere():
    monitor = StabilityMonitor(["sharpness", "lyapunov"], every_n_steps=1)
    with pytest.warns(UserWarning, match="prox="):
        fit(lambda: InStep(mlp(width=8)), monitor, max_steps=5)
    assert all(map(math.isnan, monitor.history["stability/courant_gd"].values))


@pytest.mark.parametrize("limit", [0.2, 0.1])
def test_a_plain_loop(limit):
    net = regression()
    sgd = SGD(net.parameters(), lr=0.1)
    monitor = Monitor(ProximalStep(), Sharpness(), every_n_steps=1)
    watch = Watch(net, sgd, lambda module, batch: module(), monitor, prox=CLIP)

    def loop():
        for _ in watch(range(3)):
            sgd.zero_grad()
            net().backward()
            sgd.step()
            project(net, limit)

    if limit == 0.2:
        loop()
        assert all(map(math.isfinite, watch.history[GAIN].values)) and len(watch.history[GAIN].values) == 3
    else:
        with pytest.warns(UserWarning, match=r"not prox\(step\)"):
            loop()
        assert all(map(math.isnan, watch.history[GAIN].values))
