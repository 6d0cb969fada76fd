"""Claim: the tangent response to a lost sample is what real runs without it do; to first order, and not beyond.

Regression on 40 noisy samples, full batch, from the same initial weights: a linear model and a tanh network, GD and
Adam. For 12 samples the response at the end of the run is compared with the difference of real runs in which the sample
has lost 1 % of its weight, and all of it. Printed: the median relative error of the displacement of the parameters,
the correlation of its norms over the samples, and the correlation of the rise of the sample's own loss.
"""

from functools import partial

import torch
from torch import Tensor, nn

from lsp_callbacks import Snapshot
from lsp_callbacks.functional import data_response
from lsp_callbacks.operators import step_jacobian, step_response
from lsp_callbacks.operators.sgd.sample_contributions import sample_contributions

STEPS, SAMPLES = 200, 12
x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
y = (x[:, :1] * x[:, 1:]).sin() + 0.3 * torch.randn(40, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(1))


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 1)] if kind == "linear" else [nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)]
    return nn.Sequential(*layers).double()


def losses(net: nn.Module) -> Tensor:
    return (net(x) - y).square().squeeze(-1)


def trained(kind: str, optimizer, weight: Tensor) -> nn.Module:
    net = made(kind)
    rule = optimizer(net.parameters())
    for _ in range(STEPS):
        rule.zero_grad()
        (weight * losses(net)).mean().backward()
        rule.step()
    return net


def steps(net: nn.Module, optimizer):
    rule = optimizer(net.parameters())
    for step in range(STEPS):
        rule.zero_grad()
        loss = losses(net).mean()
        loss.backward()
        gradient = {name: p.grad for name, p in net.named_parameters()}
        snapshot = Snapshot(step, net, lambda: losses(net).mean(), rule, loss=loss.detach(), gradient=gradient)
        yield (
            step_jacobian(snapshot, method="exact"),
            step_response(snapshot),
            sample_contributions(snapshot, SAMPLES).gradients,
        )
        rule.step()


def vector(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


for kind in ("linear", "tanh network"):
    for name, optimizer in (("GD", partial(torch.optim.SGD, lr=0.1)), ("Adam", partial(torch.optim.Adam, lr=0.01))):
        net = made(kind)
        response = data_response(steps(net, optimizer))[:, : len(vector(net))]
        own = losses(net)[:SAMPLES]
        slopes = torch.stack([
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])
            for loss in own
        ])  # fmt: skip
        rise = (response * slopes).sum(-1)
        for lost in (0.01, 1.0):
            moved, risen = [], []
            for i in range(SAMPLES):
                weight = torch.ones(len(x), dtype=x.dtype)
                weight[i] -= lost
                without = trained(kind, optimizer, weight)
                moved.append((vector(without) - vector(net)) / lost)
                risen.append((losses(without)[i] - losses(net)[i]).detach() / lost)
            real = torch.stack(moved)
            errors = ((response - real).norm(dim=1) / real.norm(dim=1)).sort().values
            norms = correlation(response.norm(dim=1), real.norm(dim=1))
            print(
                f"{kind}, {name}, {lost:.0%} of the weight: relative error {float(errors[SAMPLES // 2]):.2g} (largest "
                f"{float(errors[-1]):.2g}), correlation of norms {norms:.3f}, of the own loss "
                f"{correlation(rise.detach(), torch.stack(risen)):.3f}"
            )
