"""Sensitivities in depth against dense Jacobians, closed forms and finite differences; the bounds above them."""

import math

import pytest
import torch
from harness import Model, fit
from model_zoo import Custom, Twice
from problems import FEEDFORWARD, JORDAN, JORDAN_NORMS, Functional, Task, close, f64, freeze, matrix, random, seeded
from torch import nn
from torch.func import jacrev

from lsp_callbacks import StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import chain_lipschitz, depth_profile
from lsp_callbacks.functional.network.spectral_norm import weight_norms
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.operators.network.norm_bound import norm_bound


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Linear(12, 4), nn.LeakyReLU(1.5), nn.Linear(4, 2),
    )  # fmt: skip


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False)


def chain():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip


NETWORKS = {"mlp": (chain, (5, 4)), "cnn": (convolutional, (3, 36)), "transformer": (encoder, (3, 5, 4))}


def measured(make, shape, **settings):
    task = Task(make(), *shape).eval()
    states = depth(freeze(task))
    return task, states, depth_profile(states.between, len(states.layers), **settings)


def bound_of(task, states):
    shapes = {name: call.input_shape for name, call in freeze(task).calls.items()}
    return norm_bound(states, dict(task.named_modules()), shapes)


# The truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEEDFORWARD.values(), ids=FEEDFORWARD)
def test_linear_networks_have_the_printed_exponents_and_bounds(case):
    task = Task(nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in case.layers)), 3, 2)
    for layer, weight in zip(task.net, case.layers):
        layer.weight.data.copy_(weight)
    states = depth(freeze(task))
    found = depth_profile(states.between, len(states.layers))
    close(found.exponent, case.actual, 1e-9), close(found.median, case.actual, 1e-9)
    close(found.bound, case.bound, 1e-9), close(bound_of(task, states) / found.depth, case.bound, 1e-9)
    assert found.depth == len(case.layers) and found.converged


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_are_those_of_dense_jacobians(name):
    make, shape = NETWORKS[name]
    task, states, found = measured(make, shape, tol=1e-6, steps=60)
    for k, layer in enumerate(states.layers):
        last = layer.modules[-1].removeprefix("net.")
        parts = task.net.layers if name == "transformer" else task.net
        prefix = parts[: int(last.rsplit(".", 1)[-1]) + 1]

        def run(x, prefix=prefix):
            x = x[None]
            for module in prefix:
                x = module(x)
            return x.flatten()

        for i, x in enumerate(task.x):
            dense = jacrev(run)(x).flatten(1)
            close(found.sigma[k, i], torch.linalg.matrix_norm(dense, 2), 1e-6)
    assert found.converged and found.residual < 1e-6
    close(found.exponent, found.sigma[-1].max().log() / len(states.layers), 0)
    close(found.median, found.sigma[-1].median().log() / len(states.layers), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_finite_difference_along_the_top_direction_grows_by_sigma(name):
    make, shape = NETWORKS[name]
    task, states, found = measured(make, shape, tol=1e-6, steps=60)
    _, _, top = torch.linalg.svd(states.jacobian(len(states.layers)).dense())
    v = 1e-5 * top[:, 0].reshape(task.x.shape)
    growth = (task.net(task.x + v) - task.net(task.x - v)).flatten(1).norm(dim=1) / 2e-5
    close(growth, found.sigma[-1], 1e-4)


# The bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_bounds_are_in_order_and_the_jacobians_are_those_of_the_layers(name, seed):
    make, shape = NETWORKS[name]
    task = Task(make(), *shape).eval()
    seeded(task.net, seed)
    states = depth(freeze(task))
    found = depth_profile(states.between, len(states.layers), tol=1e-6, steps=60)
    assert found.factors == tuple((k, k + 1) for k in range(len(states.layers)))
    norms = [torch.linalg.matrix_norm(states.jacobian(k, j).dense(), 2) for j, k in found.factors]
    truth = torch.stack(norms).log().sum(0)
    assert ((truth <= found.log_bound) & (found.log_bound <= truth + 2e-3)).all()
    weights = bound_of(task, states) / found.depth
    assert found.exponent + 1e-3 < found.bound and found.bound + 1e-3 < weights


class Around(nn.Module):
    """A skip path around two layers that do next to nothing."""

    def __init__(self, scale):
        super().__init__()
        self.inner, self.outer, self.last, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), scale

    def forward(self, x):
        return self.last(x + self.scale * self.outer(torch.tanh(self.inner(x))))


def test_a_path_around_a_layer_makes_the_bound_one_over_both():
    task, states, found = measured(lambda: Around(1e-3), (5, 4))
    assert [layer.name for layer in states.layers] == ["net.inner", "net.outer", "net.last"]
    assert found.factors == ((0, 3),)  # X_2 is the small branch alone
    close(found.log_bound, found.sigma[-1].log(), 1e-2)
    naive = sum(torch.linalg.matrix_norm(states.jacobian(k, k - 1).dense(), 2).log() for k in (1, 2, 3))
    assert (naive < found.sigma[-1].log() - 2).all()  # the product over the layers is no bound
    with pytest.raises(Unmeasurable, match="does more than its modules"):
        bound_of(task, states)


class Doubled(nn.Module):
    """A function between two modules."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(2 * self.first(x))


@pytest.mark.parametrize(
    "make, shape, reason",
    [
        (Doubled, (5, 4), "'net.last' does more than its modules"),
        (Functional, (5, 4), "does more than its modules"),
        (encoder, (3, 5, 4), "TransformerEncoderLayer has no Lipschitz constant"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (5, 4), "LayerNorm has no Lipschitz constant"),
    ],
)
def test_where_a_layer_has_no_bound_the_reason_is_given(make, shape, reason):
    task, states, _ = measured(make, shape)
    with pytest.raises(Unmeasurable, match=reason):
        bound_of(task, states)


# One layer ------------------------------------------------------------------------------------------------------------


def test_a_normalisation_is_folded_into_its_layer():
    layer, norm = seeded(nn.Linear(4, 5)), seeded(nn.BatchNorm1d(5)).eval()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bound, y = chain_lipschitz([layer, norm, nn.Sigmoid()], random(3, 4))
    close(bound, torch.linalg.matrix_norm(scale[:, None] * layer.weight, 2) / 4, 1e-3)
    assert bound < float(scale.abs().max() * torch.linalg.matrix_norm(layer.weight, 2)) / 4 - 1e-3
    close(y, torch.sigmoid(norm(layer(random(3, 4)))), 1e-12)


def test_a_convolution_has_the_norm_of_its_operator():
    layer = seeded(nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1))
    bound, _ = chain_lipschitz([layer], random(3, 2, 6, 6), steps=100, tol=1e-6)
    assert 0 <= bound / weight_norms(layer, (2, 6, 6), steps=100, tol=1e-6)[""].value - 1 < 1e-3


@pytest.mark.parametrize("pooling, expected", [((2, 2), 1.0), ((3, 1), 3.0), ((3, 2), 2.0), ((2, 1, 0, 2), 2.0)])
def test_max_pooling_counts_the_windows_of_an_input(pooling, expected):
    layer = nn.MaxPool2d(*pooling)
    bound, _ = chain_lipschitz([layer], random(1, 1, 7, 7))
    close(bound, expected, 1e-12)
    peak = torch.zeros(1, 1, 7, 7, dtype=f64)
    peak[0, 0, 2, 2] = 1.0  # alone in all windows that hold it
    assert float(layer(peak).norm()) <= expected + 1e-12


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 3


@pytest.mark.parametrize(
    "module, name",
    [
        (nn.LayerNorm(4), "LayerNorm"), (nn.Softmax(-1), "Softmax"), (Own(4, 4), "Own"),
        (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d"), (nn.LSTM(4, 4), "LSTM"),
    ],
)  # fmt: skip
def test_what_has_no_constant_is_refused_by_name(module, name):
    with pytest.raises(Unmeasurable, match=f"{name} has no Lipschitz constant"):
        chain_lipschitz([nn.Identity(), module.eval()], torch.randn(3, 4))


# What the printed claims get wrong, and degenerate operators ----------------------------------------------------------


def constant(A):
    return lambda k, j: from_matrix(torch.linalg.matrix_power(A, k - j))


def test_the_supremum_over_all_depths_would_hide_contraction():
    found = depth_profile(constant(0.5 * torch.eye(2, dtype=f64)), 6)
    close(found.exponent, -math.log(2), 1e-9)
    close(torch.cat([torch.ones(1, 1, dtype=f64), found.sigma]).max().log() / found.depth, 0.0, 0)  # as printed


@pytest.mark.parametrize("n", [10, 100])
def test_an_exponent_of_zero_does_not_mean_bounded(n):
    found = depth_profile(constant(JORDAN), n, tol=1e-9)
    close(found.sigma[-1], [JORDAN_NORMS[n]], 1e-9)
    close(found.exponent, math.log(JORDAN_NORMS[n]) / n, 1e-9)
    close(found.bound, math.log((1 + 5**0.5) / 2), 1e-6)  # far above


def test_no_sensitivity_at_all():
    found = depth_profile(constant(torch.zeros(3, 3, dtype=f64)), 3)
    assert found.exponent == -math.inf and found.residual == 0 and found.converged
    with pytest.raises(ValueError, match="depth=0"):
        depth_profile(constant(JORDAN), 0)


def test_what_has_not_converged_says_so_and_is_a_lower_bound():
    A = torch.diag(torch.linspace(1, 2, 200, dtype=f64))
    found = depth_profile(constant(A), 1, steps=4, tol=1e-6)
    assert not found.converged and 1e-3 < found.residual < 1
    assert 1.5 < found.sigma[0, 0] < 2
    assert found.sigma[0].log() < math.log(2) < found.log_bound < math.log(4)


def test_the_vector_of_the_depth_before_does_not_hide_the_top_one():
    """It is nearly an eigenvector still, with a small residual in which the new top one has no part."""
    first, second = torch.ones(2, 200, dtype=f64)
    first[0], second[1] = 3.0, 10.0
    skew = random(200, 200) - random(200, 200).T
    skew[1] = skew[:, 1] = 0.0
    turn = torch.linalg.matrix_exp(1e-5 * skew)
    steps = [torch.diag(first), torch.diag(second) @ turn]
    found = depth_profile(
        lambda k, j: from_matrix(torch.linalg.multi_dot([*reversed(steps[j:k]), turn @ turn.T])), 2, tol=1e-9
    )
    close(found.sigma[:, 0], [3.0, 10.0], 1e-3)


def test_a_nan_stays_a_nan():
    found = depth_profile(constant(matrix([[math.nan, 0.0], [0.0, 1.0]])), 1)
    assert found.exponent.isnan() and not found.converged


class Rounds(nn.Module):
    """Takes numbers, and rounds them to words."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x.round().long() % 5).mean(1)))


def test_depth_begins_where_a_layer_depends_on_it():
    task = Task(Rounds(), 4, 6)
    states = depth(freeze(task))
    assert states.start.shape == (4, 6, 3) and [layer.name for layer in states.layers] == ["net.head"]


class Once(Twice):
    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].detach().cos()


class Detached(Once):
    @staticmethod
    def backward(ctx, g):
        return g.detach() * ctx.saved_tensors[0].cos()


class OnceOnly(Once):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_a_backward_that_cannot_be_differentiated_is_refused():
    make = lambda function: Task(nn.Sequential(nn.Linear(4, 3), Custom(function)), 5, 4)  # noqa: E731
    depth(freeze(make(Once)))  # linear in what it is given, which is all that a product needs
    for function in (Detached, OnceOnly):
        with pytest.raises(Unmeasurable, match=f"backward of {function.__name__} in the network"):
            depth(freeze(make(function)))


def test_of_a_lightning_run_each_layer_has_its_key():
    monitor = StabilityMonitor("stability_profile", every_n_steps=1)
    monitor.monitor.quantities["stability_profile"].__init__(horizon=2, directions=2)
    fit(Model, monitor, max_steps=3)
    last = {key: curve.values[-1] for key, curve in monitor.history.items()}
    sigma = [last[f"stability/sigma_x/net.{i}"] for i in (0, 2)]
    assert last["stability/sigma_x_max"] == max(sigma) and last["stability/depth"] == 2
    close(last["stability/alpha_x"], math.log(sigma[1]) / 2, 1e-9)
    assert last["stability/alpha_x"] < last["stability/alpha_x_jacobian_bound"] < last["stability/alpha_x_norm_bound"]
    for kind in ("jacobian", "norm"):
        gap = last[f"stability/alpha_x_{kind}_bound"] - last["stability/alpha_x"]
        close(last[f"stability/alpha_x_{kind}_gap"], gap, 1e-12)
