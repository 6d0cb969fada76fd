"""The sensitivity of predictions and explanations: closed forms, dense derivatives, real displacements."""

import pytest
import torch
from model_zoo import Once, Twice
from problems import close, f64, freeze, random, seeded
from torch import nn
from torch.func import functional_call, hessian, jacrev

from lsp_callbacks import Robustness, Unmeasurable
from lsp_callbacks.functional import sensitivity
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators.network.saliency import explain

KEYS = ("prediction", "prediction_theta", "explanation", "explanation_theta")


class Task(nn.Module):
    """A mean square, with the same masks at each call."""

    def __init__(self, net, samples=5, width=4):
        super().__init__()
        self.net = seeded(net)
        self.register_buffer("x", random(samples, width, seed=3))

    def forward(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.net(self.x).square().mean()


def smooth():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6, momentum=0.0), nn.Dropout(0.5), nn.Linear(6, 3))


def plain():
    """For one sample, which has no batch statistics."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def measured(task, **settings):
    metric = Robustness(**settings)
    metric.update(freeze(task))
    return {key.removeprefix("stability/robustness_"): value for key, value in metric.compute().items()}


def dense(task):
    """``df/dx`` and ``d2 f_c/dx2`` by sample, and the derivatives of all with respect to the parameters."""
    net = task.net.eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    chosen = net(task.x).argmax(1)

    def f(theta, x):
        return functional_call(net, theta, (x[None],))[0]

    def flat(tree):
        return torch.cat([t.flatten(1) for t in tree.values()], dim=1)

    parts = {name: [] for name in KEYS}
    for x, c in zip(task.x, chosen):
        own = lambda theta, x, c=c: f(theta, x)[c]  # noqa: E731
        parts["prediction"].append(jacrev(f, argnums=1)(parameters, x))
        parts["explanation"].append(hessian(own, argnums=1)(parameters, x))
        parts["prediction_theta"].append(flat(jacrev(f)(parameters, x)))
        parts["explanation_theta"].append(flat(jacrev(jacrev(own, argnums=1), argnums=0)(parameters, x)))
    task.net.train()
    return parts


def norm(name, parts):
    if name.endswith("theta"):
        return torch.linalg.matrix_norm(torch.cat(parts), ord=2) / len(parts) ** 0.5
    return torch.linalg.matrix_norm(torch.stack(parts), ord=2).max()


def test_numbers_are_norms_of_dense_derivatives():
    task = Task(smooth())
    found, truth = measured(task, samples=5, size=1e-5), dense(task)
    for name in KEYS:
        expected = norm(name, truth[name])
        assert float(expected) > 1e-2
        close(found[name], expected, 1e-4)
        close(found[f"{name}_lower"], expected, 1e-3)  # a displacement so small is the derivative
        most = 1.25 if name.endswith("theta") else 1 + 1e-6  # 3 outputs and 4 inputs are few
        assert expected * (1 - 1e-9) <= found[f"{name}_upper"] <= most * expected
    assert found["kinked"] == 0.0 and found["residual"] < 1e-3
    assert task.net.training


class Wide(nn.Module):
    """Many outputs of many parameters: Lanczos cannot be exact."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(40, 30), nn.Linear(30, 60)

    def forward(self, x):
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("seed", range(4))
def test_first_order_bounds_hold_where_norms_are_not_exact(seed):
    task = Task(seeded(Wide(), seed), 5, 40)
    found, truth = measured(task, samples=5), dense(task)
    for name in KEYS:
        expected = float(norm(name, truth[name]))
        assert found[name] <= expected * (1 + 1e-9) <= found[f"{name}_upper"] * (1 + 1e-8)
        assert found[f"{name}_upper"] <= 1.15 * expected


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_no_displacement_exceeds_the_certified_bound(size):
    """A network in a flat part of its activation: the first order says little of what lies further."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    task = Task(net, samples=3)
    with torch.no_grad():
        net[0].bias += 3.0
    found = measured(task, samples=3, size=size)
    close(
        found["prediction_certified"],
        torch.linalg.matrix_norm(net[0].weight, 2) * torch.linalg.matrix_norm(net[2].weight, 2), 1e-6,
    )  # fmt: skip
    assert found["prediction_upper"] < 0.5 * found["prediction_certified"]
    v = random(2000, 3, 4, seed=1)
    v = v / v.norm(dim=-1, keepdim=True) * torch.logspace(-2, 1.5, 2000, dtype=f64)[:, None, None]
    with torch.no_grad():
        changes = (net(task.x + v) - net(task.x)).norm(dim=-1) / v.norm(dim=-1)
    assert found["prediction_upper"] < changes.max() <= found["prediction_certified"]
    assert found["prediction_lower"] <= found["prediction_certified"]


def test_what_has_no_lipschitz_constant_is_not_certified():
    task = Task(
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), nn.Flatten())
    )
    found = measured(task)
    assert "prediction_certified" not in found and "prediction_upper" in found


def test_operators_are_dense_derivatives():
    task = Task(smooth())
    truth = dense(task)
    at = explain(freeze(task), samples=5)
    (f_x, g_x), (f_theta, g_theta) = at.by_input(), at.by_parameters()
    close(f_x.dense(), torch.stack(truth["prediction"]), 1e-10)
    close(g_x.dense(), torch.stack(truth["explanation"]), 1e-10)
    close(f_theta.dense(), torch.cat(truth["prediction_theta"]), 1e-10)
    close(g_theta.dense(), torch.cat(truth["explanation_theta"]), 1e-10)
    for operator in (f_x, g_x, f_theta, g_theta):
        close(operator.T.dense(), operator.dense().mT, 1e-10)


@pytest.mark.parametrize("size", [0.3, 1.0])
def test_lower_bounds_are_reached_by_no_more_than_the_largest_displacement(size):
    """Against the best of many random displacements of that length, and of the direction itself."""
    task = Task(plain(), samples=1)
    found = measured(task, samples=1, size=size)
    net, x = task.net.eval(), task.x[0]
    generator, d = torch.Generator().manual_seed(0), size * float(x.norm())
    v = torch.randn(4000, 4, generator=generator, dtype=f64)
    v = d * v / v.norm(dim=1, keepdim=True)
    direction = torch.linalg.svd(dense(task)["prediction"][0]).Vh[0]
    with torch.no_grad():
        changes = (net(x + torch.cat([v, d * direction[None], -d * direction[None]])) - net(x[None])).norm(dim=1) / d
    assert 0.7 * float(changes.max()) < float(found["prediction_lower"]) <= 1.001 * float(changes.max())
    assert float((changes[-2:] - found["prediction_lower"]).abs().min()) < 1e-4


def test_a_linear_network_has_closed_forms():
    """f = W x: ||W||; g = W_c, so that dg/dx = 0 and dg/dW picks a row: 1. df/dW = x: the norm of the inputs."""
    task = Task(nn.Linear(4, 3, bias=False))
    found = measured(task, samples=5)
    W, x = task.net.weight.detach(), task.x
    close(found["prediction"], torch.linalg.matrix_norm(W, ord=2), 1e-6)
    close(found["prediction_lower"], found["prediction"], 1e-6)
    close(found["prediction_theta"], torch.linalg.matrix_norm(x, ord=2) / 5**0.5, 1e-4)
    close(found["prediction_theta_lower"], found["prediction_theta"], 1e-6)
    assert found["explanation"] == found["explanation_lower"] == 0.0
    chosen = (x @ W.T).argmax(1).bincount(minlength=3).double()
    close(found["explanation_theta"], (chosen.max() / 5).sqrt(), 1e-4)
    close(found["explanation_theta_lower"], found["explanation_theta"], 1e-6)


def test_explanations_of_piecewise_linear_networks_jump():
    task = Task(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)))
    found = measured(task, size=0.5)
    assert found["kinked"] == 1.0 and "explanation" not in found and "explanation_theta" not in found
    assert float(found["explanation_lower"]) > 0.01 and float(found["explanation_theta_lower"]) > 0.01
    close(found["prediction"], norm("prediction", dense(task)["prediction"][:4]), 1e-6)
    within = measured(task, size=1e-9)  # of one linear piece
    assert within["explanation_lower"] == 0.0


def test_a_displacement_beyond_rounding_only():
    """A constant network answers to nothing, and rounding is no answer."""
    task = Task(nn.Linear(4, 3)).float()
    with torch.no_grad():
        task.net.weight.zero_()
        task.net.weight[0, 0], task.net.bias[:] = 1e-9, 1e3
    found = measured(task)
    assert found["prediction_lower"] == 0.0 and float(found["prediction"]) == pytest.approx(1e-9, rel=1e-3)
    with torch.no_grad():
        task.net.weight.zero_()
    found = measured(task)
    assert found["prediction"] == found["explanation"] == 0.0 and found["residual"] < 1e-3


def test_one_sample_at_the_origin():
    task = Task(plain(), samples=1)
    task.x.zero_()
    found = measured(task)
    assert all(bool(torch.isfinite(value)) for value in found.values()) and float(found["prediction_lower"]) > 0


def test_what_is_not_finite_is_refused():
    task = Task(smooth())
    frozen = freeze(task)
    with torch.no_grad():
        task.net[0].weight.fill_(float("nan"))
    with pytest.raises(Unmeasurable, match="could not be replayed"):
        Robustness().update(frozen)
    unchecked = freeze(task, loss=None)
    with pytest.raises(Unmeasurable, match="not finite"):
        Robustness().update(unchecked)


class Halved(nn.Module):
    """A function between the weight and its use, off the way from the input."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3), function

    def forward(self, x):
        return nn.functional.linear(x, self.function.apply(self.layer.weight)) + 0 * self.layer(x)


def test_custom_functions_are_trusted_with_no_second_derivative():
    found = measured(Task(nn.Sequential(Halved(Twice), nn.Tanh())))
    assert "explanation" not in found and "explanation_lower" in found and found["kinked"] == 0.0
    with pytest.raises(Unmeasurable, match="in the network cannot be differentiated"):
        measured(Task(nn.Sequential(Halved(Once), nn.Tanh())))


def test_half_precision_has_no_lower_bounds():
    task = Task(smooth()).bfloat16()
    found = measured(task)
    assert not any(name.endswith(("_lower", "_upper", "_certified")) for name in found)
    full = measured(Task(smooth()))
    assert float(found["prediction"]) == pytest.approx(float(full["prediction"]), rel=0.05)
    assert float(found["explanation"]) == pytest.approx(float(full["explanation"]), rel=0.1)


def test_sensitivity_of_a_map_by_hand():
    A = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=f64)
    found = sensitivity(from_matrix(A), lambda v: A @ v, 2.0)
    (
        close(found.upper, 3.0, 1e-9),
        close(found.value, 3.0, 1e-9),
        close(found.lower, 3.0, 1e-9),
        close(found.direction.abs(), [1.0, 0.0], 1e-6),
    )
    close(sensitivity(from_matrix(A), lambda v: A @ v, 2.0, rounding=2.0).lower, 2.0, 1e-9)
    close(sensitivity(from_matrix(A.T), lambda v: A.T @ v, 1.0).direction.abs(), [1.0, 0.0, 0.0], 1e-6)
    pair = torch.stack([A, 2 * A])
    close(sensitivity(from_matrix(pair), lambda v: (pair @ v[..., None])[..., 0], 1.0).lower, [3.0, 6.0], 1e-9)
    zero = sensitivity(from_matrix(0 * A), lambda v: 0 * A @ v, 1.0)
    assert zero.value == zero.lower == 0.0 and float(zero.direction.norm()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="distance"):
        sensitivity(from_matrix(A), lambda v: A @ v, 0.0)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"size": 0.0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Robustness(**bad)
