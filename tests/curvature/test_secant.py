"""The secant along the real step against the Hessian: the note's counterexamples, quadratics, every optimizer."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import Quadratic, close, f64, freeze, regression, symmetric, take, trajectory
from torch import nn

from lsp_callbacks import SecantRatio, Unmeasurable
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.quantities.curvature.secant_ratio import measured_secant
from lsp_callbacks.step.clipping import Clipping

SGD = torch.optim.SGD


class Scalar(nn.Module):
    def __init__(self, theta, loss):
        super().__init__()
        self.theta, self.loss = nn.Parameter(torch.tensor([theta], dtype=f64)), loss

    def forward(self):
        return self.loss(self.theta).sum()


def leaky(theta):
    return 0.5 * (F.leaky_relu(theta, 0.1) - 1) ** 2


@pytest.mark.parametrize(
    "lr, expected, factor",
    [(0.5, 8.506469431597676, 0.5), (0.1, 8.923635226240357, 0.1), (0.01, 8.990487302477844, 0.01)],
)
def test_leaky_relu_across_its_kink(lr, expected, factor):
    """The Hessian is at most 1 and descent monotone, yet lr * secant of the step that crosses 0 tends to 9."""
    theta, descent = -1.0, lambda theta: lr * 0.1 * (1 - 0.1 * theta)
    while theta + descent(theta) <= 0:
        theta += descent(theta)
    task = Scalar(theta, leaky)
    snapshot = freeze(task, SGD(task.parameters(), lr=lr))
    close(displacement(snapshot), [descent(theta)], 1e-15)
    crossed = measured_secant(snapshot)
    close(factor * crossed.secant, expected, 1e-9)
    close(crossed.curvature, 0.01, 1e-12)
    close(crossed.ratio, expected / lr / 0.01, 1e-9)
    assert float(crossed.unexplained) > 0.99


def test_the_absolute_value_has_no_curvature_and_oscillates():
    task = Scalar(0.35, torch.abs)
    sgd, metric, values = SGD(task.parameters(), lr=0.1), SecantRatio(), []
    for snapshot in trajectory(task, sgd, 8):
        metric.update(snapshot)
        values.append({key.removeprefix("stability/"): float(v) for key, v in metric.compute().items()})
    assert all("secant_ratio" not in one and one["secant_curvature"] == 0 for one in values)
    assert [round(one["secant_unexplained"]) for one in values] == [0, 0, 0, 1, 1, 1, 1, 1]
    close(0.1 * values[-1]["secant"], 2.0, 1e-12)  # the edge, though the sharpness is 0
    close(task.theta.detach().abs(), [0.05], 1e-12)


@pytest.mark.parametrize("method, tol", [("exact", 1e-9), ("auto", 1e-7)])
def test_on_a_quadratic_the_hessian_explains_all(method, tol):
    task = Quadratic(symmetric([3.0, 1.0, -0.5, 0.2]), sizes=(3, 1))
    snapshot = freeze(task, SGD(task.parameters(), lr=0.3, momentum=0.9))
    found = measured_secant(snapshot, method=method)
    close(found.ratio, 1.0, tol)
    assert float(found.unexplained) < 1e-7
    g = snapshot.flat_gradient
    close(found.secant, (task.curvature @ g).norm() / g.norm(), 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_short_steps_of_a_smooth_network_agree_and_long_ones_need_not(scale):
    task = regression()
    found = measured_secant(freeze(task, SGD(task.parameters(), lr=3 * scale)))
    assert (float(found.unexplained) < 0.01) == (scale < 1)
    assert (abs(float(found.ratio) - 1) < 0.01) == (scale < 1)


OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clipping", [None, Clipping(0.05)])
def test_the_displacement_is_what_the_optimizer_does(name, clipping):
    kind, settings = OPTIMIZERS[name]
    task = regression()
    optimizer = kind(task.parameters(), **settings)
    for _ in range(2):
        take(optimizer, task())
    parameters = list(task.parameters())
    before, state = [p.detach().clone() for p in parameters], [len(v) for v in optimizer.state.values()]
    predicted = displacement(freeze(task, optimizer, clipping=clipping))
    assert all(map(torch.equal, before, parameters)) and [len(v) for v in optimizer.state.values()] == state
    optimizer.zero_grad()
    task().backward()
    if clipping is not None:
        nn.utils.clip_grad_norm_(parameters, 0.05)
    optimizer.step()
    close(predicted, torch.cat([(p - b).reshape(-1) for p, b in zip(parameters, before)]), 1e-12)


def test_finite_differences_of_the_loss_are_the_third_witness():
    """``<d, g(theta + d) - g(theta)>`` by the loss alone, along the step."""
    task = regression()
    snapshot = freeze(task, SGD(task.parameters(), lr=1.0))
    step, e = displacement(snapshot), 1e-5
    parameters = list(task.parameters())

    def loss(t):
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            for p, d in zip(parameters, step.split([p.numel() for p in parameters])):
                p += t * d.view_as(p)
            value = float(task())
            for p, b in zip(parameters, before):
                p.copy_(b)
        return value

    along = ((loss(1 + e) - loss(1 - e)) - (loss(e) - loss(-e))) / (2 * e)
    with torch.no_grad():
        found = measured_secant(snapshot)
    # The projection of the change on the step is at most its length.
    assert abs(along) / float(step.norm()) ** 2 <= float(found.secant) * (1 + 1e-6)
    one = Scalar(0.3, lambda t: t.cosh())
    single = freeze(one, SGD(one.parameters(), lr=0.5))
    d = float(displacement(single))
    close(measured_secant(single).secant, (math.sinh(0.3 + d) - math.sinh(0.3)) / d, 1e-12)
    close(measured_secant(single).curvature, math.cosh(0.3), 1e-7)


def test_a_step_that_moves_nothing_and_steps_that_are_not_known_are_refused():
    task = regression()
    with pytest.raises(Unmeasurable, match="moves no parameter"):
        measured_secant(freeze(task, SGD(task.parameters(), lr=0.0)))
    with pytest.raises(Unmeasurable, match="no optimizer"):
        measured_secant(freeze(task))
    with pytest.raises(Unmeasurable, match="a hook"):
        measured_secant(freeze(task, SGD(task.parameters(), lr=0.1), unsupported="a hook"))
    with pytest.raises(ValueError, match="method"):
        SecantRatio(method="best")
