"""Batch sharpness: closed forms, the tangent kernel's limit, and the number of batches."""

import pytest
import torch
from problems import close, dense_hessian, f64, freeze, regression
from torch import nn
from torch.optim import SGD

from lsp_callbacks import BatchSharpness, Monitor, Snapshot, Unmeasurable
from lsp_callbacks.functional import batch_sharpness
from lsp_callbacks.quantities.curvature.batch_sharpness import curvature_of_step


def step_of(curvature, theta=2.0, step=0, **settings):
    """A step on ``a theta^2 / 2``."""
    module = nn.Module()
    module.theta = nn.Parameter(torch.tensor([theta], dtype=f64))
    loss = lambda: 0.5 * curvature * module.theta.square().sum()  # noqa: E731
    gradient = {"theta": curvature * module.theta.detach()}
    optimizer = SGD(module.parameters(), lr=0.1)
    return Snapshot(step, module, loss, optimizer, loss=loss().detach(), gradient=gradient, **settings)


def test_two_scalar_samples_have_the_printed_means():
    """a = 1 and 3: the mean of ratios is 2, the ratio of means 2.8, and the mean-square edge 2.5."""
    found = batch_sharpness(torch.stack([curvature_of_step(step_of(a)) for a in (1.0, 3.0)]))
    close(found.mean_of_ratios, 2.0, 1e-6), close(found.ratio_of_means, 2.8, 1e-6)
    close(found.mean_of_ratios_error, 1.0, 1e-6)  # sd of {1, 3} is sqrt 2, over sqrt 2
    assert found.batches == 2


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_it_is_the_dense_quotient(method):
    problem = regression()
    loss = problem()
    g = torch.autograd.grad(loss, list(problem.parameters()))
    flat, H = torch.cat([p.reshape(-1) for p in g]), dense_hessian(problem)
    names = [name for name, _ in problem.named_parameters()]
    snapshot = freeze(problem, SGD(problem.parameters(), lr=0.1), gradient=dict(zip(names, g)), loss=loss.detach())
    top, below = curvature_of_step(snapshot, method=method)
    close(below, flat @ flat, 1e-9), close(top / below, flat @ H @ flat / (flat @ flat), 1e-3)


def test_near_interpolation_a_single_sample_feels_its_own_row_of_the_kernel():
    """Squared loss, residual e -> 0: g = e J_i, so the quotient is K_ii."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(1, 2, dtype=f64)
    y = net(x).detach() + 1e-7
    loss = lambda: 0.5 * (net(x) - y).square().sum()  # noqa: E731
    gradient = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss(), list(net.parameters()))))
    top, below = curvature_of_step(Snapshot(0, net, loss, gradient=gradient), method="exact")
    row = torch.cat([p.reshape(-1) for p in torch.autograd.grad(net(x).sum(), list(net.parameters()))])
    close(top / below, row @ row, 1e-5)


def test_the_error_of_the_ratio_is_that_of_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    below = 1 + torch.rand(2000, 50, generator=generator, dtype=f64)
    pairs = torch.stack([below * (2 + torch.randn(below.shape, generator=generator, dtype=f64)), below], dim=-1)
    found = [batch_sharpness(p) for p in pairs]
    for value, error in (("mean_of_ratios", "mean_of_ratios_error"), ("ratio_of_means", "ratio_of_means_error")):
        spread = torch.stack([getattr(f, value) for f in found]).std()
        claimed = torch.stack([getattr(f, error) for f in found]).mean()
        assert 0.93 < claimed / spread < 1.07


@pytest.mark.parametrize("spread, least, most", [(0.0, 8, 8), (0.2, 9, 20), (0.9, 30, 100)])
def test_as_many_batches_as_the_error_asks_for(spread, least, most):
    monitor = Monitor(BatchSharpness(most=100), every_n_steps=1000)
    curvatures = [1 + spread * (-1) ** k + (3 * spread if k % 7 == 0 else 0) for k in range(100)]
    steps = [monitor.observe(step_of(a, step=k)) for k, a in enumerate(curvatures)]
    (done,) = [observation for observation in steps if observation is not None]
    used = int(done.values["stability/batch_sharpness_batches"])
    assert used == done.step + 1 and least <= used <= most
    expected = batch_sharpness(torch.tensor([[a**3, a**2] for a in curvatures[:used]], dtype=f64))
    close(done.values["stability/batch_sharpness"], expected.mean_of_ratios, 1e-3)
    close(done.values["stability/batch_sharpness_of_means"], expected.ratio_of_means, 1e-3)


def test_a_gap_starts_again():
    metric = BatchSharpness(most=8)
    for k in (*range(7), *range(20, 28)):
        metric.update(step_of(100.0 if k < 20 else 1.0, step=k))
    close(metric.compute()["stability/batch_sharpness"], 1.0, 1e-3)


def test_a_gradient_that_is_0_is_refused_and_one_that_is_not_given_is_replayed():
    snapshot = step_of(1.0)
    with pytest.raises(Unmeasurable, match="gradient"):
        zero = {"theta": torch.zeros(1, dtype=f64)}
        curvature_of_step(Snapshot(0, snapshot.module, snapshot.replay, gradient=zero))
    close(curvature_of_step(Snapshot(0, snapshot.module, snapshot.replay)), curvature_of_step(snapshot), 1e-3)
    for bad in ({"rtol": 0.0}, {"most": 3}):
        with pytest.raises(ValueError, match=r"rtol|most"):
            BatchSharpness(**bad)
