"""Losses that depend on the parameters by way of tensors without a graph: noticed, compared, refused if it matters."""

import copy

import pytest
import torch
from problems import close, f64, random
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm

from lsp_callbacks import Snapshot
from lsp_callbacks.autograd.stop_gradients import StopGradients
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.operators import hessian
from lsp_callbacks.step.batch import MicroBatch
from lsp_callbacks.step.module_copy import ModuleCopy
from lsp_callbacks.step.replay import replayer

X, Y = random(12, 4, seed=1), random(12, 3, seed=2)


def mlp(wrap=lambda layer: layer, *, act=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(4, 5)), act(), wrap(nn.Linear(5, 3))).to(f64)


def mean_square(net):
    return (net(X) - Y).square().mean()


def shifted(net):
    """Stable log-sum-exp by hand: the detached maximum changes nothing."""
    z = net(X)
    z = z - z.max(-1, keepdim=True).values.detach()
    return (z.exp().sum(-1).log() - z[:, 0]).mean()


def masked(net):
    return ((net(X) > 0).to(f64) * (net(X) - Y).square()).mean()


def noted(net):
    z = net(X)
    z.detach().mean().item()
    return (z - Y).square().mean()


class ByHand(nn.Module):
    """A batch norm whose running mean is what it subtracts."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        z = self.inner(x)
        with torch.no_grad():
            self.mean.mul_(0.5).add_(0.5 * z.mean(0))
        return (z - self.mean) * z


def snapshot_of(net, loss):
    start = {name: b.clone() for name, b in net.named_buffers()}

    def replay():
        for name, b in net.named_buffers():  # as a copy of the module that begins each replay with the step's own
            b.copy_(start[name])
        return loss(net)

    gradient = torch.autograd.grad(replay(), list(net.parameters()))
    names = [name for name, _ in net.named_parameters()]
    return Snapshot(0, net, replay, loss=replay().detach(), gradient=dict(zip(names, gradient)))


REFUSED = {
    "spectral norm": (lambda: mlp(parametrizations.spectral_norm), mean_square),
    "spectral norm, ReLU": (lambda: mlp(parametrizations.spectral_norm, act=nn.ReLU), mean_square),
    "spectral norm by a hook": (lambda: mlp(spectral_norm), mean_square),
    "a detached loss": (mlp, lambda net: mean_square(net) * mean_square(net).detach()),
    "data": (mlp, lambda net: (net(X) * net(X).data).mean()),
    "running mean": (lambda: ByHand().to(f64), mean_square),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", ["auto", "exact", "finite_difference"])
def test_a_gradient_that_moves_behind_the_back_of_autograd_is_refused(name, method):
    make, loss = REFUSED[name]
    snapshot = snapshot_of(make(), loss)
    with pytest.raises(Unsupported, match="without a graph"):
        hessian(snapshot, method=method)


@pytest.mark.parametrize("loss, stopped", [(shifted, ("detach",)), (masked, ()), (noted, ()), (mean_square, ())])
def test_what_makes_no_difference_is_measured(loss, stopped):
    net = mlp()
    snapshot = snapshot_of(net, loss)
    assert snapshot.graph.stopped == stopped
    names, parameters = zip(*net.named_parameters())

    def flat(theta):
        parts = theta.split([p.numel() for p in parameters])
        values = {name: part.view_as(p) for name, part, p in zip(names, parts, parameters)}
        return loss(lambda x: torch.func.functional_call(net, values, (x,)))

    theta = torch.cat([p.detach().reshape(-1) for p in parameters])
    close(hessian(snapshot, method="exact").dense(), torch.autograd.functional.hessian(flat, theta), 1e-9)


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, spectral_norm])
def test_spectral_norm_is_measured_where_its_iteration_rests(wrap):
    net = mlp(wrap)
    for _ in range(50):
        net(X)
    snapshot = snapshot_of(net.eval(), mean_square)
    assert snapshot.graph.stopped == () and bool(hessian(snapshot).dense().isfinite().all())


def test_batch_norm_and_dropout_take_nothing_behind_its_back():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).to(f64)
    snapshot = Snapshot(0, net, lambda: F.mse_loss(net(X), Y))
    assert snapshot.graph.stopped == ()


def test_by_how_much_products_with_fixed_vectors_would_be_wrong():
    """The number that is refused, against the derivative of the gradient by which training moves."""
    net = mlp(parametrizations.spectral_norm)
    snapshot = snapshot_of(net, mean_square)
    parameters = list(net.parameters())
    parts = torch.autograd.grad(snapshot.replay(), parameters, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in parts])
    rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, parameters, retain_graph=True)]) for g in gradient]
    fixed, start, columns = torch.stack(rows), [p.detach().clone() for p in parameters], []

    def moved(direction, by):
        with torch.no_grad():
            for p, s, d in zip(parameters, start, direction.split([p.numel() for p in parameters])):
                p.copy_(s + by * d.view_as(p))
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(snapshot.replay(), parameters)])

    for direction in torch.eye(len(gradient), dtype=f64):
        columns.append((moved(direction, 1e-5) - moved(direction, -1e-5)) / 2e-5)
    true = torch.stack(columns, 1)
    assert (fixed - true).norm() > 0.1 * true.norm() and (true - true.T).norm() > 0.1 * true.norm()


def test_a_deep_copy_depends_on_what_is_copied():
    """Not on what its memo holds: parameters that a copied module shares."""
    p = torch.ones(3, requires_grad=True)
    memo = {id(p): p}
    with StopGradients() as stopped:
        (copy.deepcopy(torch.ones(3), dict(memo)) * p).sum()
    assert not stopped.names
    with StopGradients() as stopped:
        (copy.deepcopy(p.detach(), dict(memo)) * p).sum()
    assert stopped.names == {"detach"}


def test_a_table_that_a_module_keeps_is_a_constant():
    """A copy of the module holds a copy of it, which each replay makes anew."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.table = mlp(), torch.ones(4, dtype=f64)

        def forward(self):
            return (self.net(X * self.table) - Y).square().mean()

    module = Positions()
    module_copy = ModuleCopy(module)
    replay = replayer(module_copy, [MicroBatch(None, lambda module, batch: module())])
    v = random(sum(p.numel() for p in module.parameters()))
    own = hessian(Snapshot(step=0, module=module, replay=module), method="exact") @ v
    copied = Snapshot(step=0, module=module_copy.module, replay=replay)
    close(hessian(copied, method="exact") @ v, own, 1e-12)
    assert not copied.graph.stopped
