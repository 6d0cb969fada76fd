"""The exponent of a plain loop: closed forms, dense Jacobians, maps whose exponents are printed in books."""

import copy
import math
import random as python_random

import numpy as np
import pytest
import torch
from problems import close, f64, random, same
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from lsp_callbacks import Unmeasurable
from lsp_callbacks.functional import training_exponent


def train_step(net, optimizer, batch):
    x, y = batch
    optimizer.zero_grad()
    (0.5 * (net(x) - y).square().sum(-1).mean()).backward()
    optimizer.step()


def line(curvature=1.0, **settings):
    """One parameter; the loss is ``curvature theta^2 / 2``."""
    net = nn.Linear(1, 1, bias=False, dtype=f64)
    nn.init.constant_(net.weight, 0.3)
    return net, SGD(net.parameters(), **settings), scalar(curvature)


def scalar(curvature):
    return torch.tensor([[math.sqrt(curvature)]], dtype=f64), torch.zeros(1, 1, dtype=f64)


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.9, 2.3])
def test_on_one_curvature_it_is_log_of_one_minus_rate_times_curvature(rate):
    net, sgd, batch = line(lr=rate)
    close(training_exponent(train_step, net, sgd, [batch] * 5), math.log(abs(1 - rate)), 1e-6)


def test_of_two_samples_it_is_the_mean_over_the_steps_that_were_taken():
    net, sgd, _ = line(lr=0.5)
    batches = [scalar(1.0), scalar(10.0), scalar(10.0)]
    expected = (math.log(0.5) + 2 * math.log(4.0)) / 3
    close(training_exponent(train_step, net, sgd, batches), expected, 1e-6)


def test_with_momentum_it_is_the_spectral_radius_of_the_companion_matrix():
    rate, beta = 4.2, 0.9  # beyond 2 + 2 beta: real eigenvalues, one below -1
    net, sgd, batch = line(lr=rate, momentum=beta)
    roots = np.roots([1, -(1 + beta - rate), beta])
    found = training_exponent(train_step, net, sgd, [batch] * 60, burn_in=40)
    close(found, math.log(abs(roots).max()), 1e-6)


def test_a_step_that_lands_on_the_minimum_leaves_nothing():
    def land(net, _, batch):
        with torch.no_grad():
            net.weight.zero_()

    net, _, batch = line(lr=1.0)
    assert training_exponent(land, net, None, [batch] * 3) == -math.inf


# Dense Jacobians ------------------------------------------------------------------------------------------------------


def network(dtype=f64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def data(n=5, dtype=f64):
    return [(random(6, 3, seed=k).to(dtype), random(6, 2, seed=100 + k).to(dtype)) for k in range(n)]


@pytest.mark.parametrize("dtype, tol", [(f64, 1e-6), (torch.float32, 2e-3)])
def test_it_is_the_growth_by_the_product_of_the_dense_step_jacobians(dtype, tol):
    net, rate, batches = network(dtype), 0.4, data(dtype=dtype)
    found = training_exponent(
        train_step, net, SGD(net.parameters(), lr=rate), batches, generator=torch.Generator().manual_seed(3)
    )
    generator, names = torch.Generator().manual_seed(3), [name for name, _ in net.named_parameters()]
    v = torch.cat([torch.randn(p.shape, generator=generator, dtype=dtype).flatten() for p in net.parameters()]).double()
    reference = copy.deepcopy(net).double()
    shapes = [p.shape for p in reference.parameters()]
    theta = torch.cat([p.detach().flatten() for p in reference.parameters()])

    def stepped(flat, batch):
        def loss(flat):
            parts = flat.split([shape.numel() for shape in shapes])
            values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
            return 0.5 * (functional_call(reference, values, batch[0]) - batch[1]).square().sum(-1).mean()

        return flat - rate * grad(loss)(flat)

    w = v / v.norm()
    for x, y in batches:
        batch = (x.double(), y.double())
        w, theta = jacrev(stepped)(theta, batch) @ w, stepped(theta, batch)
    close(found, float(w.norm().log()) / len(batches), tol)


@pytest.mark.parametrize("optimizer", [Adam, AdamW])
def test_the_optimizers_state_is_part_of_what_differs(optimizer):
    """Twins of the test's own, never moved back: in float64 six steps of Adam do not need it."""
    net, batches = network(), data(6)
    distance = 1e-6 * float(torch.cat([p.detach().flatten() for p in net.parameters()]).norm())
    found = training_exponent(
        train_step, net, optimizer(net.parameters(), lr=0.05), batches, distance=1e-6, generator=torch.Generator()
    )
    generator = torch.Generator()
    v = [torch.randn(p.shape, generator=generator, dtype=f64) for p in net.parameters()]
    scale, ends = distance / torch.cat([p.flatten() for p in v]).norm(), []
    for sign in (1, -1):
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for p, direction in zip(twin.parameters(), v):
                p.add_(sign * scale * direction)
        steps = optimizer(twin.parameters(), lr=0.05)
        for batch in batches:
            train_step(twin, steps, batch)
        ends.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    close(found, float(((ends[0] - ends[1]).norm() / (2 * distance)).log()) / 6, 1e-4)


# Maps whose exponents are known ---------------------------------------------------------------------------------------


class State(nn.Module):
    def __init__(self, *start):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=f64))


def test_the_logistic_map_has_log_two():
    def logistic(state, _, batch):
        with torch.no_grad():
            state.x.copy_(4 * state.x * (1 - state.x))

    found = training_exponent(logistic, State(0.3141), None, range(1000), burn_in=100)
    close(found, math.log(2), 0.02)


def test_the_henon_map_has_the_printed_exponent():
    """0.419 nats at a = 1.4, b = 0.3: Sprott, Chaos and Time-Series Analysis, 2003."""

    def henon(state, _, batch):
        with torch.no_grad():
            x, y = state.x.clone()
            state.x.copy_(torch.stack([1 - 1.4 * x * x + y, 0.3 * x]))

    close(training_exponent(henon, State(0.1, 0.1), None, range(1500), burn_in=100), 0.4192, 0.02)


# No trace -------------------------------------------------------------------------------------------------------------


def test_module_optimizer_and_random_states_are_left_bit_for_bit():
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    net[2].eval()
    optimizer = Adam(net.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 1)  # it binds the optimizer's step
    batches = data(4)
    train_step(net, optimizer, batches[0])

    def seen():
        return (
            copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()),
            [p.grad.clone() for p in net.parameters()], [m.training for m in net.modules()], torch.get_rng_state(),
            python_random.getstate(), np.random.get_state()[1].tolist(),
            scheduler.last_epoch, [p._version for p in net.parameters()],
        )  # fmt: skip

    def noisy_step(net, optimizer, batch):
        python_random.random(), np.random.rand()
        batch[0].add_(0.1 * torch.randn_like(batch[0]))  # in place
        train_step(net, optimizer, batch)

    before, inputs = seen(), copy.deepcopy(batches)
    first = training_exponent(noisy_step, net, optimizer, batches)
    assert same(before[:5], seen()[:5]) and before[5:] == seen()[5:] and same(inputs, batches)
    assert first == training_exponent(noisy_step, net, optimizer, batches) and first.isfinite()


def test_all_runs_see_the_same_random_numbers():
    """Were the masks of the twins others than the run's, their difference would be that of the masks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    found = training_exponent(train_step, net, SGD(net.parameters(), lr=1e-6), data(5))
    close(found, 0.0, 1e-3)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_step_that_uses_the_original_is_refused():
    net, sgd, batch = line(lr=0.1)
    with pytest.raises(ValueError, match="original Linear"):
        training_exponent(lambda _, optimizer, b: train_step(net, optimizer, b), net, sgd, [batch])
    with pytest.raises(ValueError, match="original SGD"):
        training_exponent(lambda module, _, b: train_step(module, sgd, b), net, sgd, [batch])
    train_step(net, sgd, batch)  # it works again afterwards


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(burn_in=-1), "burn_in=-1"),
        (dict(burn_in=3), "burn_in=3 leaves no step"),
        (dict(distance=0.0), "distance=0.0"),
        (dict(batches=[]), "leaves no step"),
    ],
)
def test_arguments_out_of_range_are_named(settings, match):
    net, sgd, batch = line(lr=0.1)
    with pytest.raises(ValueError, match=match):
        training_exponent(train_step, net, sgd, **{"batches": [batch] * 3, **settings})


def test_half_precision_frozen_modules_and_lbfgs_are_refused():
    net, _, batch = line(lr=0.1)
    with pytest.raises(ValueError, match=r"module\.float"):
        training_exponent(train_step, nn.Linear(1, 1, dtype=torch.bfloat16), None, [batch])
    with pytest.raises(ValueError, match="unfreeze"):
        training_exponent(train_step, nn.Linear(1, 1).requires_grad_(False), None, [batch])

    def closure_step(net, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = (net(batch[0]) - batch[1]).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    with pytest.raises(Unmeasurable, match="LBFGS"):
        training_exponent(closure_step, net := network(), LBFGS(net.parameters(), lr=0.01, max_iter=3), data(3))


def test_what_is_not_linear_not_finite_or_below_rounding_is_refused():
    net, _, batch = line(lr=0.1)

    def bent(net, _, batch):
        with torch.no_grad():
            net.weight.copy_(1e4 * (net.weight - 0.3).abs())

    with pytest.raises(Unmeasurable, match="mirror"):
        training_exponent(bent, net, None, [batch])

    def lost(net, _, batch):
        with torch.no_grad():
            net.weight.fill_(math.inf)

    with pytest.raises(Unmeasurable, match="not finite after step 0"):
        training_exponent(lost, net, None, [batch])

    def shrunk(net, _, batch):
        with torch.no_grad():
            net.weight.copy_(1 + 1e-7 * net.weight)

    with pytest.raises(Unmeasurable, match="rounding"):
        training_exponent(shrunk, net, None, [batch])
