"""Hessian and sharpness of a plain module and loss: closed forms, dense matrices, differences of gradients."""

import copy
import random as python_random

import numpy as np
import pytest
import torch
from problems import close, f64, random, same
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lsp_callbacks import Unmeasurable
from lsp_callbacks.functional import loss_hessian, sharpness

HALF_SQUARES = lambda f, y: 0.5 * (f - y).square().sum(-1).mean()  # noqa: E731


def mlp(*, activation=nn.Tanh, dtype=f64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).to(dtype)


def batch(n=7, dtype=f64, targets=None):
    return random(n, 4).to(dtype), random(n, 3, seed=1).to(dtype) if targets is None else targets


def labels(n=7):
    return torch.arange(n) % 3


def dense(module, loss_fn, pair):
    """By ``torch.autograd.functional`` on the flat vector, in the order of the parameters."""
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()))
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])

    def loss(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        return loss_fn(functional_call(module, {**values, **buffers}, (pair[0],)), pair[1])

    return torch.autograd.functional.hessian(loss, flat)


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_of_linear_regression_it_is_the_top_eigenvalue_of_the_second_moment():
    x = random(9, 5)
    value = sharpness(nn.Linear(5, 1, bias=False, dtype=f64), HALF_SQUARES, (x, torch.zeros(9, 1, dtype=f64)))
    close(value, torch.linalg.eigvalsh(x.T @ x / 9)[-1], 1e-10)
    assert value.dtype == f64 and value.shape == () and not value.requires_grad


def test_it_is_the_largest_algebraic_eigenvalue_not_the_largest_in_size():
    saddle = torch.diag(torch.tensor([-5.0, 2.0, 1.0], dtype=f64))

    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=f64))

        def forward(self, H):
            return 0.5 * self.theta @ H @ self.theta

    close(sharpness(Saddle(), lambda f, _: f, (saddle, None)), 2.0, 1e-10)
    close(sharpness(Saddle(), lambda f, _: f, (-torch.eye(3, dtype=f64), None)), -1.0, 1e-10)


def test_of_a_loss_that_is_linear_in_the_parameters_it_is_zero():
    assert sharpness(nn.Linear(3, 1), lambda f, y: f.sum(), (torch.ones(2, 3), None)) == 0


# Dense matrices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
@pytest.mark.parametrize("loss_fn, targets", [(HALF_SQUARES, None), (F.cross_entropy, labels())])
def test_it_is_that_of_the_dense_hessian(activation, loss_fn, targets):
    net, pair = mlp(activation=activation), batch(targets=targets)
    H = dense(net, loss_fn, pair)
    hessian, gradient = loss_hessian(net, loss_fn, pair)
    close(hessian.dense(), H, 1e-12)
    expected = torch.autograd.grad(loss_fn(net(pair[0]), pair[1]), list(net.parameters()))
    close(gradient, torch.cat([g.flatten() for g in expected]), 1e-14)
    close(sharpness(net, loss_fn, pair), torch.linalg.eigvalsh(H)[-1], 1e-10)


@pytest.mark.parametrize("dtype, tol", [(f64, 1e-3), (torch.float32, 1e-3)])
def test_where_lanczos_stops_early_the_dense_value_lies_within_the_tolerance(dtype, tol):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    pair = batch(dtype=dtype)
    double = copy.deepcopy(net).double()
    eigenvalues = torch.linalg.eigvalsh(dense(double, HALF_SQUARES, tuple(t.double() for t in pair)))
    value = sharpness(net, HALF_SQUARES, pair, tol=tol, steps=120)
    assert -tol * eigenvalues.abs().max() <= value - eigenvalues[-1] <= 1e-5
    close(value, eigenvalues[-1], 1e-5)  # it is far better where the top stands apart


def test_batch_norm_in_training_mode_goes_through_the_batch_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double()
    H = dense(net, HALF_SQUARES, batch())
    close(loss_hessian(net, HALF_SQUARES, batch())[0].dense(), H, 1e-12)
    evaluated = dense(net.eval(), HALF_SQUARES, batch())
    assert (H - evaluated).abs().max() > 0.01
    close(loss_hessian(net, HALF_SQUARES, batch())[0].dense(), evaluated, 1e-12)


def test_frozen_and_tied_parameters_count_once_or_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1, bias=False, dtype=f64)
            self.b = nn.Linear(1, 1, bias=False, dtype=f64)
            self.frozen = nn.Linear(1, 1, bias=False, dtype=f64).requires_grad_(False)
            self.b.weight = self.a.weight
            nn.init.constant_(self.a.weight, 2.0), nn.init.constant_(self.frozen.weight, 3.0)

        def forward(self, x):
            return self.frozen(self.b(self.a(x)))

    # L = (3 w^2)^2 / 2, L'' = 54 w^2 = 216.
    pair = (torch.ones(1, 1, dtype=f64), torch.zeros(1, 1, dtype=f64))
    close(sharpness(Tied(), HALF_SQUARES, pair), 216.0, 1e-10)


# Differences of gradients, by another library -------------------------------------------------------------------------


def test_scipy_finds_the_same_from_differences_of_gradients_alone():
    net, pair = mlp(), batch(targets=labels())
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    twin = copy.deepcopy(net)

    def gradient(theta):
        torch.nn.utils.vector_to_parameters(theta, twin.parameters())
        grads = torch.autograd.grad(F.cross_entropy(twin(pair[0]), pair[1]), list(twin.parameters()))
        return torch.cat([g.flatten() for g in grads])

    def product(v):
        v = torch.from_numpy(v).flatten()
        return ((gradient(start + 1e-5 * v) - gradient(start - 1e-5 * v)) / 2e-5).numpy()

    (top,) = eigsh(ScipyOperator((len(start),) * 2, product, dtype=float), k=1, which="LA")[0]
    close(sharpness(net, F.cross_entropy, pair), top, 1e-6)


def test_gradient_descent_turns_unstable_at_two_over_it():
    """On the quadratic model of the network, from a displacement along the top eigenvector."""
    net, pair = mlp(), batch()
    hessian, _ = loss_hessian(net, HALF_SQUARES, pair)
    value = float(sharpness(net, HALF_SQUARES, pair))
    eigenvector = torch.linalg.eigh(hessian.dense())[1][:, -1]
    for rate, grows in ((1.99 / value, False), (2.01 / value, True)):
        v = eigenvector.clone()
        for _ in range(50):
            v = v - rate * (hessian @ v)
        assert bool((v @ eigenvector).abs() > 1) == grows


# No trace -------------------------------------------------------------------------------------------------------------


def test_the_module_and_the_random_states_are_left_bit_for_bit():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    ).double()
    pair = batch()
    net(pair[0]).sum().backward()
    fired = []
    net[0].weight.register_hook(lambda g: fired.append(g))
    pending = net(pair[0]).square().sum()  # a graph that holds the buffers
    fired.clear()

    def seen():
        return (
            copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()],
            [m.training for m in net.modules()], torch.get_rng_state(),
            python_random.getstate(), np.random.get_state()[1].tolist(),
            [t._version for t in (*net.parameters(), *net.buffers())], torch.is_grad_enabled(),
        )  # fmt: skip

    before = seen()
    first = sharpness(net, HALF_SQUARES, pair)
    after = seen()
    assert same(before[:4], after[:4]) and before[4:] == after[4:] and not fired
    with torch.no_grad():
        assert sharpness(net, HALF_SQUARES, pair) == first  # the same masks, the same start
    pending.backward()  # nothing was changed in place


def test_all_products_see_the_same_dropout_mask():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    H = loss_hessian(net, HALF_SQUARES, batch())[0].dense()
    close(H, H.T, 1e-12)
    assert (net[1](torch.ones(1000)) == 0).any()


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_may_be_one_tensor_arguments_or_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0, dtype=f64))

        def forward(self, a, b):
            return self.w * a * b

    a, b = torch.tensor([2.0], dtype=f64), torch.tensor([3.0], dtype=f64)
    for inputs in ((a, b), [a, b], {"a": a, "b": b}):
        close(sharpness(Two(), lambda f, y: 0.5 * f.square().sum(), (inputs, None)), 36.0, 1e-10)


@pytest.mark.parametrize("pair", [torch.zeros(2, 4), (torch.zeros(2, 4),), (1, 2, 3)])
def test_a_batch_that_is_no_pair_is_refused(pair):
    with pytest.raises(ValueError, match=r"give a pair \(inputs, targets\)"):
        sharpness(mlp(), HALF_SQUARES, pair)


@pytest.mark.parametrize("settings, match", [(dict(tol=0.0), "tol=0.0"), (dict(steps=1), "steps=1")])
def test_arguments_out_of_range_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        sharpness(mlp(), HALF_SQUARES, batch(), **settings)


# Refusals -------------------------------------------------------------------------------------------------------------


class Detaching(torch.autograd.Function):
    """The square, whose backward lacks the derivative by the input that it has saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g


class Differentiable(Detaching):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3, dtype=f64), function

    def forward(self, x):
        return self.function.apply(self.layer(x))


def test_a_custom_backward_is_compared_with_differences():
    net = Custom(Differentiable)
    close(sharpness(net, HALF_SQUARES, batch()), torch.linalg.eigvalsh(dense(net, HALF_SQUARES, batch()))[-1], 1e-8)
    with pytest.raises(Unmeasurable, match="Detaching"):
        sharpness(Custom(Detaching), HALF_SQUARES, batch())


def test_what_depends_on_the_parameters_without_a_graph_is_refused():
    class Stopped(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layer, self.factor = nn.Linear(4, 3, dtype=f64), factor

        def forward(self, x):
            return self.layer(x) * (1 + self.factor * self.layer.weight.detach().square().sum())

    close(
        sharpness(Stopped(0.0), HALF_SQUARES, batch()),
        sharpness(nn.Linear(4, 3, dtype=f64), HALF_SQUARES, batch()),
        1e-9,
    )
    with pytest.raises(Unmeasurable, match=r"detach.*without a graph"):
        sharpness(Stopped(1.0), HALF_SQUARES, batch())
    torch.manual_seed(0)
    normed = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    with pytest.raises(Unmeasurable, match=r"spectral_norm.*module\.eval"):
        sharpness(normed, HALF_SQUARES, batch())
    close(
        sharpness(normed.eval(), HALF_SQUARES, batch()),
        torch.linalg.eigvalsh(dense(normed, HALF_SQUARES, batch()))[-1],
        1e-8,
    )


def test_what_has_no_second_derivative_is_named():
    class Once(Detaching):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    with pytest.raises(Unmeasurable, match=r"Once|differentiated twice"):
        sharpness(Custom(Once), HALF_SQUARES, batch())


@pytest.mark.parametrize(
    "module, loss_fn, match",
    [
        (mlp().requires_grad_(False), HALF_SQUARES, "unfreeze"),
        (mlp(), lambda f, y: f, r"gave shape \(7, 3\)"),
        (mlp(), lambda f, y: float(f.sum()), "gave float"),
        (mlp(), lambda f, y: f.sum() / 0, r"the loss is -?inf"),
        (mlp(), lambda f, y: f.detach().sum(), "depends on no parameter"),
    ],
)
def test_losses_without_a_curvature_are_refused(module, loss_fn, match):
    with pytest.raises(Unmeasurable, match=match):
        sharpness(module, loss_fn, batch())


def test_half_precision_is_refused():
    with pytest.raises(Unmeasurable, match=r"bfloat16.*module\.float"):
        sharpness(mlp(dtype=torch.bfloat16), HALF_SQUARES, batch(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Unmeasurable, match="autocast"):
        sharpness(mlp(dtype=torch.float32), HALF_SQUARES, batch(dtype=torch.float32))


def test_too_few_products_are_said_with_both_bounds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    with pytest.raises(Unmeasurable, match=r"after steps=3 .* lies between .* and .*give more steps"):
        sharpness(net, HALF_SQUARES, batch(), steps=3)
