"""The derivative of Muon's step against its own code in double precision, autograd, and real runs; its refused edge."""

import copy
from functools import partial

import pytest
import torch
from problems import Regression, close, f64, freeze, random, same, symmetric, take
from torch import nn
from torch.optim import Muon

from lsp_callbacks import Lyapunov, LyapunovTrajectory, MeanSquareStability, Sharpness, Unmeasurable
from lsp_callbacks.operators import frozen_rule, state_weight, step_jacobian, step_response, tangent_path
from lsp_callbacks.operators.trajectory.muon import orthogonalised
from lsp_callbacks.operators.trajectory.proximal import expected
from lsp_callbacks.step.clipping import Clipping

KINDS = {
    "default": partial(Muon, lr=0.05),
    "no_nesterov": partial(Muon, lr=0.05, nesterov=False, momentum=0.7, weight_decay=0.3),
    "no_momentum": partial(Muon, lr=0.05, momentum=0.0),
    "other_rate": partial(Muon, lr=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=3),
    "other_polynomial": partial(Muon, lr=0.05, ns_coefficients=(2.0, -1.5, 0.5), ns_steps=8),
    "large_eps": partial(Muon, lr=0.05, eps=10.0),
    "rate_in_a_tensor": partial(Muon, lr=torch.tensor(0.05)),
}


class Matrices(Regression):
    """A wide and a tall matrix."""

    def __init__(self):
        net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 5, bias=False))
        super().__init__(net.double(), random(9, 4, seed=1), random(9, 5, seed=2))


def in_double(function, *arguments):
    """Call torch's own code without its rounding to bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        return function(*arguments)


def moved(problem, optimizer, z, steps=1, clipping=None):
    """Parameters and buffers after real steps of a copy, displaced by z."""
    problem, optimizer = copy.deepcopy((problem, optimizer))
    parameters = list(problem.parameters())
    sizes = [p.numel() for p in parameters]
    with torch.no_grad():
        for name, row in zip(("theta", "momentum_buffer"), z.view(2, -1)):
            for p, part in zip(parameters, row.split(sizes)):
                target = p if name == "theta" else optimizer.state.get(p, {}).get(name)
                if target is not None:
                    target += part.view_as(target)
    for _ in range(steps):
        optimizer.zero_grad()
        problem().backward()
        if clipping is not None:
            nn.utils.clip_grad_norm_(parameters, clipping.limit)
        in_double(optimizer.step)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    return torch.cat([t.detach().reshape(-1) for t in (*parameters, *buffers)])


def differentiated(z, *arguments, e=1e-6):
    f = [moved(*arguments[:2], s * e * z, *arguments[2:]) for s in (1, -1, 2, -2)]
    return (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * e)


@pytest.mark.parametrize("clipping", [None, Clipping(0.05)], ids=["free", "clipped"])
@pytest.mark.parametrize("steps", [0, 3], ids=["first_step", "later"])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_derivative_of_the_real_step_without_its_rounding(name, steps, clipping):
    problem = Matrices()
    optimizer = KINDS[name](problem.parameters())
    for _ in range(steps):
        take(optimizer, problem())
    snapshot = freeze(problem, optimizer, clipping=clipping)
    before = copy.deepcopy((problem.state_dict(), optimizer.state_dict()))
    A = step_jacobian(snapshot, method="exact")
    z, w = random(A.shape[1], seed=3), random(A.shape[0], seed=4)
    if not steps:
        z[len(z) // 2 :] = 0.0  # there is no buffer to displace
    truth = differentiated(z, problem, optimizer, 1, clipping)
    close(A @ z / truth.norm(), truth / truth.norm(), 2e-7)
    pulled = A.T @ w
    close(w @ (A @ z), pulled @ z, 1e-10 * float(w.norm() * (A @ z).norm()))
    B = step_response(snapshot)
    change = random(B.shape[1], seed=5)
    close(w @ (B @ change), (B.T @ w) @ change, 1e-10 * float(w.norm() * (B @ change).norm()))
    assert same(before, (problem.state_dict(), optimizer.state_dict())) and tangent_path(snapshot) == "exact"


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_the_orthogonalisation_is_torchs_and_its_derivative_that_of_autograd(shape):
    group, u = Muon([nn.Parameter(torch.zeros(2, 2))]).param_groups[0], random(*shape, seed=1)
    end, derivative = orthogonalised(u, group)
    own = torch.optim._muon._zeropower_via_newtonschulz
    code = lambda u: in_double(own, u.clone(), group["ns_coefficients"], group["ns_steps"], group["eps"])  # noqa: E731
    close(end, code(u), 1e-13)
    rounded = own(u, group["ns_coefficients"], group["ns_steps"], group["eps"]).double()
    assert (rounded - end).norm() < 0.05 * end.norm()

    def smooth(u):  # in one line each, to be differentiated
        wide = u.mT if u.shape[0] > u.shape[1] else u
        x = wide / wide.norm()
        for _ in range(group["ns_steps"]):
            a, b, c = group["ns_coefficients"]
            x = a * x + b * (x @ x.mT) @ x + c * (x @ x.mT) @ (x @ x.mT) @ x
        return x.mT if wide is not u else x

    dense = torch.autograd.functional.jacobian(smooth, u).reshape(u.numel(), u.numel())
    eye = torch.eye(u.numel(), dtype=f64)
    for product, truth in ((derivative.push, dense), (derivative.pull, dense.T)):
        found = torch.stack([product(row) for row in eye], 1)
        close(found / dense.norm(), truth / dense.norm(), 1e-12)


def test_three_steps_follow_two_displaced_runs():
    problem = Matrices()
    optimizer = Muon(problem.parameters(), lr=0.05)
    for _ in range(2):
        take(optimizer, problem())
    z = random(2 * sum(p.numel() for p in problem.parameters()))
    truth = differentiated(z, problem, optimizer, 3)
    for step in range(3):
        z = step_jacobian(freeze(problem, optimizer, step=step), method="exact") @ z
        optimizer.zero_grad()
        problem().backward()
        in_double(optimizer.step)
    close(z / truth.norm(), truth / truth.norm(), 1e-5)


def test_a_gradient_of_zeros_is_no_singularity():
    problem = Matrices()
    problem.y.zero_()
    with torch.no_grad():
        problem.net[2].weight.zero_()
    snapshot = freeze(problem, Muon(problem.parameters(), lr=0.05, weight_decay=0.0))
    assert not any(g.any() for g in snapshot.gradient.values())
    assert step_jacobian(snapshot, method="exact").dense().isfinite().all()
    assert bool((state_weight(snapshot) > 0).all())


def test_the_parameters_are_where_the_step_is_expected_to_leave_them_in_single_precision():
    """Its iterates are in bfloat16: rounding of the gradient can move the update by almost 1 %."""
    torch.manual_seed(0)
    for width in (5, 64, 256):  # the last is where it was seen
        net = nn.Sequential(nn.Linear(64, width, bias=False), nn.Tanh(), nn.Linear(width, 10, bias=False))
        problem = Regression(net, torch.randn(200, 64), torch.randn(200, 10))
        follow(net, problem)


def follow(net, problem):
    """Every step is where it should be; a displacement is noticed."""
    optimizer = Muon(problem.parameters(), lr=0.02)
    for step in range(20):
        target = expected(freeze(problem, optimizer, step=step))
        take(optimizer, problem())
        assert target.met()
    with torch.no_grad():
        net[0].weight += 0.1 * target.distance / net[0].weight.numel() ** 0.5
    assert not target.met()


@pytest.mark.parametrize("quantity", [Lyapunov, MeanSquareStability])
def test_no_edge_of_stability_for_the_reason(quantity):
    problem = Matrices()
    snapshot = freeze(problem, Muon(problem.parameters()))
    with pytest.raises(Unmeasurable, match="as long for a small gradient"):
        quantity().check(snapshot)
    with pytest.raises(Unmeasurable, match="as long for a small gradient"):
        frozen_rule(snapshot)
    Sharpness().check(snapshot), LyapunovTrajectory().check(snapshot)
    assert "as long for a small gradient" in Sharpness().unknown_update(snapshot)


def test_a_frozen_orthogonalisation_would_give_the_same_courant_number_at_any_rate():
    """The wrong number that is avoided: ``lr lambda(D H) / 2`` with D held fixed, whatever lr is, once it hovers."""
    H, numbers = symmetric([4.0, 1.0, 0.5]), []
    for lr in (0.1, 1e-3):
        theta = nn.Parameter(random(3, 3))
        optimizer = Muon([theta], lr=lr, momentum=0.0, weight_decay=0.0)
        late = []
        for step in range(300 if lr > 0.01 else 4000):
            loss = (theta @ H * theta).sum() / 2
            optimizer.zero_grad()
            loss.backward()
            if step > 200 and step % 10 == 0:
                g = theta.grad
                values, vectors = torch.linalg.eigh(g @ g.T)
                D = vectors @ torch.diag(values.clamp_min(1e-30) ** -0.5) @ vectors.T
                late.append(lr * float(torch.linalg.eigvals(torch.kron(D, H)).real.max()) / 2)
            optimizer.step()
        numbers.append(float(torch.tensor(late[-20:]).median()))
        assert loss.isfinite()
    assert max(numbers) / min(numbers) < 10 and min(numbers) > 1  # over a hundred times the rate; and it is stable
