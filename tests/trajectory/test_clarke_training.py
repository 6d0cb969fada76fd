"""Generalized sensitivities of training: intervals of generalized Jacobians, vertices by brute force, real runs."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import close, f64, freeze, random, seeded, take, tanh_mlp, trajectory
from torch import nn
from torch.optim import SGD, Adam

from lsp_callbacks import ClarkeTraining, Unmeasurable
from lsp_callbacks.functional import Box, MaxNorm, Only, Ridge, SoftThreshold
from lsp_callbacks.functional.trajectory.clarke_training import generalized_training, no_steps
from lsp_callbacks.operators.curvature.gradient_kinks import loss_kinks, prox_kinks
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.step.clipping import Clipping


def values_of(metric):
    return {key.removeprefix("stability/"): float(value) for key, value in metric.compute().items()}


class Task(nn.Module):
    """A network and a loss of outputs and targets."""

    def __init__(self, net, x, y, loss):
        super().__init__()
        self.net, self.x, self.y, self.loss = net, x, y, loss

    def forward(self):
        return self.loss(self.net(self.x), self.y)


def line(theta, x, y, loss=F.huber_loss):
    """``loss(theta x, y)``, one or more parameters."""
    net = nn.Linear(len(theta), 1, bias=False).double()
    net.weight.data.copy_(torch.tensor([theta], dtype=f64))
    return Task(net, torch.tensor(x, dtype=f64), torch.tensor(y, dtype=f64)[:, None], loss)


def measured(task, rule, horizon=1, metric=None, prox=None):
    """Along a real run, prox included."""
    metric, optimizer = ClarkeTraining(horizon=horizon, **metric or {}), rule(task.parameters())
    for step in range(horizon):
        metric.update(freeze(task, optimizer, step=step, prox=prox))
        take(optimizer, task())
        for group in optimizer.param_groups:
            for name, p in task.named_parameters():
                p.data = p.data if prox is None else prox(name, p.data, group["lr"])
    assert metric.complete
    return values_of(metric)


# Closed forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("residual", [1.0, 1.0 - 5e-4, 1.0 + 5e-4, 0.9, 1.1])
def test_huber_in_one_dimension_is_an_interval(rate, residual):
    """The slope of ``theta - rate huber'(theta)`` is anything between ``1 - rate`` and 1 at the bend."""
    found = measured(line([residual], [[1.0]], [0.0]), SGD_of(rate))
    bent, inside = abs(residual - 1) < 1e-3, residual < 1  # at the bend autograd takes the slope outside
    ordinary = abs(1 - rate) if inside else 1.0
    sup = max(abs(1 - rate), 1.0) if bent else ordinary
    close(found["clarke_theta_ordinary"], ordinary, 1e-12)
    close(found["clarke_theta_lower"], sup, 1e-12), close(found["clarke_theta_upper"], sup, 1e-12)
    close(found["clarke_alpha_theta_upper"], math.log(sup), 1e-12)
    close(found["clarke_u_upper"], rate, 1e-12)  # the noise of one step has not travelled
    assert found["clarke_training_near"] == bent and found["clarke_training_exact"] == 1
    assert math.isnan(found["clarke_alpha_u_upper"])


def SGD_of(rate, **options):
    return lambda parameters: SGD(parameters, lr=rate, **options)


@pytest.mark.parametrize("rate", [0.5, 2.5])
def test_two_residuals_in_two_dimensions(rate):
    """``I - rate (s_1 a_1 a_1^T + s_2 a_2 a_2^T) / 2`` with free s: the largest norm of four."""
    rows = torch.tensor([[1.0, 0.3], [-0.2, 1.2]], dtype=f64)
    task = line([0.7, -0.4], rows.tolist(), [0.7 - 0.12 - 1.0, -0.14 - 0.48 + 1.0])
    found = measured(task, SGD_of(rate))
    assert found["clarke_training_near"] == 2
    eye, norms = torch.eye(2, dtype=f64), []
    for s in itertools.product((0.0, 1.0), repeat=2):
        norms.append(torch.linalg.matrix_norm(eye - rate / 2 * (rows.T * torch.tensor(s)) @ rows, 2))
    close(found["clarke_theta_lower"], max(norms), 1e-12), close(found["clarke_theta_upper"], max(norms), 1e-12)


def test_soft_threshold_at_its_kink():
    """``D (1 - rate)`` with D between 0 and 1, and a second number that is far from its threshold."""
    task = line([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], [2.0, 1.5], F.mse_loss)
    rate, start = 0.3, 0.0
    end = start + rate * 2.0  # of the first number, after the step
    found = measured(task, SGD_of(rate), prox=SoftThreshold(end / rate))
    close(found["clarke_theta_lower"], 1 - rate, 1e-12)
    assert found["clarke_training_near"] == 1
    task = line([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], [2.0, 1.5], F.mse_loss)
    assert measured(task, SGD_of(rate), prox=Only("nothing", SoftThreshold(2.0)))["clarke_training_near"] == 0


def test_a_product_may_exceed_the_norms_that_the_slopes_have():
    """Two steps at the bend: the ordinary derivative is 1, the generalized one up to ``(1 - rate)^2``."""
    # Inside of the bend by nothing: the first step moves by the rate, to the other bend.
    found = measured(line([1.0 + 1e-9], [[1.0]], [0.0]), SGD_of(2.0), horizon=2, metric={"eps": 1e-3})
    close(found["clarke_theta_lower"], 1.0, 1e-9)
    found = measured(line([1.25 + 1e-9], [[1.0]], [0.0], partial(F.huber_loss, delta=1.25)), SGD_of(2.0), horizon=2)
    assert found["clarke_training_near"] == 2 and found["clarke_theta_upper"] >= found["clarke_theta_ordinary"]


# Brute force --------------------------------------------------------------------------------------------------------


LOSSES = {
    "huber": (partial(F.huber_loss, delta=0.7), nn.Tanh),
    "smooth_l1, sum": (partial(F.smooth_l1_loss, beta=0.7, reduction="sum"), nn.Tanh),
    "elu": (F.mse_loss, nn.ELU),
}
RULES = {"sgd": SGD_of(0.4), "momentum": SGD_of(0.2, momentum=0.9), "adam": lambda p: Adam(p, lr=0.05)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_sup_is_that_of_all_vertices(loss, rule):
    """Against Hessians by another way: the bent functions replaced by parabolas with either curvature."""
    function, activation = LOSSES[loss]
    net = seeded(nn.Sequential(nn.Linear(2, 2), activation(), nn.Linear(2, 1)))
    task = Task(net, random(6, 2, seed=1), 1.5 * random(6, 1, seed=2), function)
    eps, P = 0.15, sum(p.numel() for p in net.parameters())
    optimizer = RULES[rule](task.parameters())
    metric = ClarkeTraining(horizon=3, eps=eps, vertices=14)
    choices: list = []
    for snapshot in trajectory(task, optimizer, 3):
        near = loss_kinks(snapshot, eps=eps)
        metric.update(snapshot)
        A, B = update_jacobian(snapshot, method="exact").dense(), update_response(snapshot).dense()
        flat = {name: p.detach().clone() for name, p in task.named_parameters()}
        kept, here = [], bent(task, flat, loss, eps, None)
        for s in itertools.product((0.0, 1.0), repeat=len(near.above)):
            kept.append(A + F.pad(B @ (bent(task, flat, loss, eps, s) - here), (0, len(A) - P)))
        choices.append((kept, B))
    found = values_of(metric)
    count = math.prod(len(kept) for kept, _ in choices)
    assert 2 <= count <= 2**12 and found["clarke_training_exact"] == 1
    assert found["clarke_training_near"] == math.log2(count)
    largest = [0.0, 0.0]
    for steps in itertools.product(*(kept for kept, _ in choices)):
        product, reach = torch.eye(len(steps[0]), P, dtype=f64), []
        for A, (_, B) in zip(steps, choices):
            product, reach = A @ product, [*(A @ noise for noise in reach), B]
        for i, matrix in enumerate((product[:P], torch.cat(reach, 1)[:P])):
            largest[i] = max(largest[i], float(torch.linalg.matrix_norm(matrix, 2)))
    close(found["clarke_theta_lower"], largest[0], 1e-8), close(found["clarke_theta_upper"], largest[0], 1e-8)
    close(found["clarke_u_lower"], largest[1], 1e-8), close(found["clarke_u_upper"], largest[1], 1e-8)
    kicks = math.sqrt(sum(float(torch.linalg.matrix_norm(B[:P], 2)) ** 2 for _, B in choices))
    close(found["clarke_alpha_u_upper"], math.log(largest[1] / kicks), 1e-8)


def bent(task, parameters, loss, eps, slopes):
    """The Hessian where the near units have these shares of their curvature; None leaves them as they are."""
    function, _ = LOSSES[loss]
    slopes = None if slopes is None else torch.tensor(slopes, dtype=f64)

    def replaced(z, kind, distance, size):
        """A parabola with the same value and slope, for those that are near."""
        if slopes is None:
            return kind(z)
        point = z.detach()
        near = distance(point) <= eps * point.square().mean().sqrt()
        with torch.enable_grad():
            at = point.clone().requires_grad_()
            (first,) = torch.autograd.grad(kind(at).sum(), at)
        curvature = torch.zeros_like(point)
        curvature[near] = slopes * size
        step = z - point
        return torch.where(near, kind(point) + first * step + curvature * step.square() / 2, kind(z))

    def value(p):
        net = {name.removeprefix("net."): x for name, x in p.items()}
        first, last = (lambda x, i=i: F.linear(x, net[f"{i}.weight"], net[f"{i}.bias"]) for i in (0, 2))
        z = first(task.x)
        if loss == "elu":
            return F.mse_loss(last(replaced(z, F.elu, lambda z: z.abs(), 1.0)), task.y)
        r = last(z.tanh()) - task.y
        own = function.keywords | {"reduction": "none", "target": torch.zeros_like(r)}
        phi = partial(function.func, **own)
        size = 1.0 if loss == "huber" else 1 / 0.7
        total = replaced(r, phi, lambda r: (r.abs() - 0.7).abs(), size)
        return total.mean() if loss == "huber" else total.sum()

    flat = torch.cat([p.flatten() for p in parameters.values()])

    def of_flat(v):
        parts = v.split([p.numel() for p in parameters.values()])
        return value({name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts)})

    return torch.autograd.functional.hessian(of_flat, flat)


@pytest.mark.parametrize("prox", [SoftThreshold(0.3), Box(-0.4, 0.4), Ridge(0.5)], ids=["soft", "box", "ridge"])
def test_real_runs_from_nearby_starts_stay_below_the_bound(prox):
    """The derivative of the real map of three steps, by differences at starts around a kink."""
    start = line([0.3, -0.5], [[1.0, 0.2], [0.1, 0.8], [0.5, -1.0]], [0.4, -1.3, 0.2])

    def after(theta):
        task = copy.deepcopy(start)
        task.net.weight.data.copy_(theta.view(1, 2))
        optimizer = SGD(task.parameters(), lr=0.4)
        for _ in range(3):
            take(optimizer, task())
            task.net.weight.data.copy_(prox("net.weight", task.net.weight.data, 0.4))
        return task.net.weight.data.flatten().clone()

    found = measured(copy.deepcopy(start), SGD_of(0.4), horizon=3, prox=prox, metric={"eps": 0.2, "vertices": 16})
    theta, norms = start.net.weight.data.flatten(), []
    for seed in range(20):
        at = theta + 0.005 * random(2, seed=seed)
        columns = [(after(at + 1e-6 * e) - after(at - 1e-6 * e)) / 2e-6 for e in torch.eye(2, dtype=f64)]
        norms.append(float(torch.linalg.matrix_norm(torch.stack(columns, 1), 2)))
    assert max(norms) <= found["clarke_theta_upper"] + 1e-6
    assert found["clarke_theta_lower"] >= found["clarke_theta_ordinary"] - 1e-12


def test_many_units_have_an_ascent_and_a_certified_bound():
    task = Task(tanh_mlp(2, 3, 1), random(40, 2, seed=1), random(40, 1, seed=2), partial(F.huber_loss, delta=0.7))
    exact = measured(copy.deepcopy(task), SGD_of(0.4), horizon=2, metric={"eps": 0.08, "vertices": 14})
    rough = measured(copy.deepcopy(task), SGD_of(0.4), horizon=2, metric={"eps": 0.08, "vertices": 0})
    assert exact["clarke_training_exact"] == 1 and rough["clarke_training_exact"] == 0
    assert exact["clarke_training_near"] == rough["clarke_training_near"] >= 3
    for name in ("theta", "u"):
        truth = exact[f"clarke_{name}_lower"]
        assert rough[f"clarke_{name}_lower"] <= truth * (1 + 1e-12) <= rough[f"clarke_{name}_upper"] * (1 + 2e-12)


# What is refused ----------------------------------------------------------------------------------------------------


def refused(task, reason, optimizer=SGD, **settings):
    snapshot = freeze(task, optimizer(task.parameters()), **settings)
    with pytest.raises(Unmeasurable, match=reason):
        ClarkeTraining(horizon=1).update(snapshot)


def net(activation):
    return seeded(nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 1)))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh(), nn.LeakyReLU()])
def test_a_training_map_that_jumps_is_refused(activation):
    task = Task(net(activation), random(6, 2), random(6, 1), F.huber_loss)
    refused(task, "gradient jumps at the kinks of .*training map.*no generalized Jacobian.*forward pass only")


def test_other_jumps_are_refused():
    x, y = random(6, 2), random(6, 1)
    refused(Task(net(nn.Tanh()), x, y, F.l1_loss), "gradient jumps")
    refused(Task(net(nn.Tanh()), x, y, partial(F.smooth_l1_loss, beta=0.0)), "beta=0")
    refused(Task(net(nn.SELU()), x, y, F.mse_loss), "selu")
    refused(Task(net(nn.ELU(alpha=0.5)), x, y, F.mse_loss), "elu")
    task = Task(net(nn.Tanh()), x, y, F.mse_loss)
    refused(task, "each number by itself", prox=MaxNorm(0.1))
    norm = float(torch.cat([g.flatten() for g in torch.autograd.grad(task(), list(task.parameters()))]).norm())
    refused(task, "at the limit of its clipping", clipping=Clipping(norm))
    refused(task, "amsgrad", optimizer=lambda p: Adam(p, amsgrad=True))
    refused(Task(seeded(nn.Linear(2, 600)), x, random(6, 600), F.mse_loss), "most=512")
    with pytest.raises(ValueError, match="no step"):
        generalized_training(no_steps(2, 2))


def test_what_is_smooth_is_the_ordinary_sensitivity():
    task = Task(net(nn.Tanh()), random(6, 2), random(6, 1), F.mse_loss)
    product = torch.eye(17, dtype=f64)
    metric = ClarkeTraining(horizon=2)
    for snapshot in trajectory(task, SGD(task.parameters(), lr=0.3), 2):
        assert not len(prox_kinks(snapshot, eps=1e-3).above)
        product = update_jacobian(snapshot, method="exact").dense() @ product
        metric.update(snapshot)
    found = values_of(metric)
    for end in ("lower", "upper", "ordinary"):
        close(found[f"clarke_theta_{end}"], torch.linalg.matrix_norm(product, 2), 1e-9)
    assert found["clarke_training_near"] == 0
