"""Differences at kinks: slopes are held, so that products are those of two backward passes, at the price of one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import close, f64, freeze, random
from torch import nn

from lsp_callbacks.operators import hessian
from lsp_callbacks.operators.curvature.gradient_difference import Untrusted
from lsp_callbacks.operators.curvature.held_slopes import HeldSlopes, with_held_slopes
from lsp_callbacks.operators.curvature.hessian import path_taken


class Problem(nn.Module):
    """A small network and the loss of one batch."""

    def __init__(self, make, shape=(16, 5), classes=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = make().double()
        self.register_buffer("x", random(*shape, seed=2))
        self.y = torch.arange(shape[0]) % classes

    def forward(self):
        return F.cross_entropy(self.net(self.x), self.y)


def mlp(act):
    return lambda: nn.Sequential(nn.Linear(5, 12), act, nn.Linear(12, 8), act, nn.Linear(8, 3))


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv(pool, act):
    return lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), act, pool, nn.Flatten(), nn.Linear(36, 3)
    )


IMAGE = (6, 1, 6, 6)
HELD = {
    "relu": Problem(mlp(nn.ReLU())),
    "relu in place": Problem(mlp(nn.ReLU(inplace=True))),
    "relu6": Problem(mlp(nn.ReLU6())),
    "leaky": Problem(mlp(nn.LeakyReLU(0.3))),
    "hardtanh": Problem(mlp(nn.Hardtanh(-0.4, 0.3))),
    "hardsigmoid": Problem(mlp(nn.Hardsigmoid())),
    "clamp": Problem(mlp(Called(lambda z: z.clamp(-0.2, max=0.5)))),
    "abs": Problem(mlp(Called(torch.abs))),
    "method": Problem(mlp(Called(lambda z: z.relu_()))),
    "pooling": Problem(conv(nn.MaxPool2d(2), nn.ReLU()), IMAGE),
    "pooling, padded": Problem(conv(nn.MaxPool2d(3, 2, padding=1), nn.Tanh()), IMAGE),
}
#: In functions that can be differentiated twice.
TWINS = {"hardsigmoid": Problem(mlp(Called(lambda z: (z / 6 + 0.5).clamp(0.0, 1.0))))}


def exact(problem):
    return hessian(freeze(problem, gradient=None), method="exact").dense()


@pytest.mark.parametrize("name", HELD)
def test_products_are_those_of_two_backward_passes(name):
    problem = HELD[name]
    snapshot, H = freeze(problem), exact(TWINS.get(name, problem))
    close(hessian(snapshot).dense(), H, 1e-5 * torch.linalg.matrix_norm(H, 2))
    assert path_taken(snapshot, "auto") == "finite difference, slopes held"


@pytest.mark.parametrize("name", HELD)
def test_the_held_loss_is_the_step_s_with_its_gradient(name):
    problem = HELD[name]
    parameters, held = list(problem.parameters()), HeldSlopes(problem)
    recorded, replayed, plain = held.record(), held.replay(), problem()
    for a, b, c in zip(*(torch.autograd.grad(loss, parameters) for loss in (recorded, replayed, plain))):
        close(a, c, 1e-12)
        close(b, c, 1e-12)


def test_across_a_kink_the_slopes_stay_those_of_the_step():
    """The largest unit moves to the other side; the loss that is replayed there is the one without the kink."""
    net = nn.Linear(1, 1, bias=False).double()
    held = HeldSlopes(lambda: net(torch.ones(1, 1, dtype=f64)).relu().square().sum())
    with torch.no_grad():
        net.weight.fill_(0.5)
    held.record()
    with torch.no_grad():
        net.weight.fill_(-3.0)
    loss = held.replay()
    close(loss, 9.0, 1e-12)
    close(torch.autograd.grad(loss, net.weight)[0].sum(), -6.0, 1e-12)


def test_single_precision_next_to_kinks():
    """A wide network has units within any distance of their kinks."""
    problem = Problem(lambda: nn.Sequential(nn.Linear(5, 400), nn.ReLU(), nn.Linear(400, 3)), (64, 5)).float()
    H = exact(problem).double()
    v = torch.linalg.eigh(H).eigenvectors[:, -1]
    snapshot = freeze(problem)
    close((hessian(snapshot) @ v.float()).double(), H @ v, 0.01 * torch.linalg.matrix_norm(H, 2))
    assert path_taken(snapshot, "auto") == "finite difference, slopes held"


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp(nn.ReLU())()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


UNHELD = {
    "prelu": lambda: mlp(nn.PReLU())(),
    "a bound that is a tensor": lambda: mlp(Called(lambda z: z.clamp_min(0.1 * z.detach().mean())))(),
    "maximum": lambda: mlp(Called(lambda z: torch.maximum(z, 0.2 * z)))(),
    "a checkpoint, whose forward pass is called again": Checkpointed,
}


@pytest.mark.parametrize("name", UNHELD)
def test_other_kinks_are_left_to_exact_products(name):
    problem = Problem(UNHELD[name])
    snapshot, H = freeze(problem), exact(problem)
    close(hessian(snapshot).dense(), H, 1e-9 * torch.linalg.matrix_norm(H, 2))
    assert path_taken(snapshot, "auto") == "exact"
    assert with_held_slopes(snapshot) is None


class Routed(nn.Module):
    """Which activations are called depends on the weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(5, 6), nn.Linear(6, 3), []

    def forward(self, x):
        z = self.first(x).relu()
        self.calls.append(1)
        return self.second(z.relu() if len(self.calls) > 3 else z)


def test_a_replay_that_calls_other_activations_is_not_believed():
    problem = Problem(Routed)
    held = HeldSlopes(problem)
    held.record()
    problem.net.calls.extend([1, 1, 1])
    with pytest.raises(Untrusted, match="other activations"):
        held.replay()


def test_a_replay_that_is_not_the_step_is_refused_when_slopes_are_noted():
    problem = HELD["relu"]
    with pytest.raises(Exception, match="could not be replayed"):
        with_held_slopes(replace(freeze(problem), loss=torch.tensor(7.0)))
