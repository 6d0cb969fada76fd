"""`collapsed` on networks that are dead for good, and on healthy ones that look like them."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import freeze
from torch import nn

from lsp_callbacks import MeanSquareStability, ProbeSet
from lsp_callbacks.step.criterion import evaluation

CLASSES = 5


def mlp(act=nn.ReLU, depth=2, width=32):
    layers = [nn.Linear(16, width), act()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def zero_head(bias=0.0):
    net = mlp()
    nn.init.zeros_(net[-1].weight), net[-1].bias.data.copy_(bias * torch.linspace(-1, 1, CLASSES))
    return net


class Then(nn.Module):
    """A network and what follows it."""

    def __init__(self, net, after):
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x):
        return self.after(self.net(x))


def masked():
    """Ten classes, five of which are ruled out."""
    return Then(mlp(), lambda f: torch.cat([f, torch.full_like(f, -1e9)], 1))


def rain():
    """Outputs that are zero for most samples, as their targets are."""
    net = Then(mlp(), lambda f: F.relu(f[:, :1] + 0.1))
    net.criterion = lambda f, y: F.mse_loss(f, 3.0 * (y == 0).float()[:, None])
    return net


class Adapted(nn.Module):
    """A correction of low rank that begins with zeros, on a network that is frozen."""

    def __init__(self):
        super().__init__()
        self.net, self.low = mlp().requires_grad_(False), nn.Sequential(nn.Linear(16, 2), nn.Linear(2, CLASSES))
        nn.init.zeros_(self.low[1].weight), nn.init.zeros_(self.low[1].bias)

    def forward(self, x):
        return self.net(x) + self.low(x)


def run(make, optimizer, *, seed=0, labels="true", inputs="true", warm_up=0, scale=1.0, steps=40, every=4, before=0):
    """Readings of `collapsed`, and the loss of the probes at first and in the end."""
    torch.manual_seed(seed)
    centres, y = scale * torch.randn(CLASSES, 16), torch.randint(0, CLASSES, (256,))
    x = centres[y] + 0.7 * torch.randn(256, 16)
    if labels == "random":
        y = y[torch.randperm(256)]
    elif labels == "rare":  # 97 % are of one class
        y = torch.where(torch.rand(256) < 0.97, 0, y)
    elif labels == "few":  # 6 % are of the first
        y = torch.where(torch.rand(256) < 0.7, y.clamp_min(1), y)
    if inputs == "the same":
        x = torch.ones_like(x)
    net = make()
    criterion = getattr(net, "criterion", F.cross_entropy)
    optimizer = optimizer([p for p in net.parameters() if p.requires_grad])
    lr = optimizer.param_groups[0]["lr"]
    seen, seen_y = x[:64], y[:64]
    part = lambda: evaluation(net(seen), lambda f: criterion(f, seen_y), samples=64)  # noqa: E731
    probes = ProbeSet(net, (part,), 64, 32, 256)
    metric, told = MeanSquareStability(), []
    start = float(criterion(net(seen), seen_y).detach())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warm_up) if warm_up else lr
        rows = torch.randint(0, 256, (32,))
        loss = lambda rows=rows: criterion(net(x[rows]), y[rows])  # noqa: E731
        if step >= before and step % every == 0:
            metric.update(freeze(net, optimizer, step=step, probes=probes, replay=loss))
            told.append(float(metric.compute()["stability/collapsed"]))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return told, start, float(criterion(net(seen), seen_y).detach())


def adam(lr):
    return lambda p: torch.optim.Adam(p, lr=lr)


DEAD = {
    "relu": (lambda: mlp(depth=4), adam(3.0), {"steps": 128, "every": 12}),
    "deeper": (lambda: mlp(depth=6), adam(1.0), {"steps": 128, "every": 12}),
    "rectified_logits": (lambda: nn.Sequential(*mlp(depth=3), nn.ReLU()), adam(3.0), {"steps": 128, "every": 12}),
    "before_the_first_reading": (lambda: mlp(depth=4), adam(3.0), {"before": 40, "steps": 110, "every": 12}),
}
HEALTHY = {
    "first_steps": (mlp, adam(1e-3), {"every": 1, "steps": 12}),
    "large_rate": (mlp, adam(3e-2), {}),
    "noisy_labels": (mlp, adam(1e-3), {"labels": "random"}),
    "rare": (mlp, adam(1e-2), {"labels": "rare"}),
    "zero_head": (zero_head, adam(1e-3), {"every": 1, "steps": 12}),
    "zero_head_warm_up": (zero_head, adam(1e-2), {"every": 1, "steps": 16, "warm_up": 8}),
    "nothing_moves": (zero_head, adam(0.0), {"every": 1, "steps": 8}),
    "explodes_and_comes_back": (mlp, adam(3.0), {"steps": 60}),
    "rectified_logits": (lambda: nn.Sequential(*mlp(), nn.ReLU()), adam(1e-3), {"labels": "random", "every": 2}),
    "a_head_of_prior_odds": (lambda: zero_head(2.0), adam(1e-9), {"every": 1, "steps": 6}),
    "low_rank": (Adapted, adam(1e-3), {"every": 1, "steps": 6}),
    "classes_ruled_out": (masked, adam(1e-3), {"every": 2, "steps": 12}),
    "the_same_inputs": (mlp, adam(1e-3), {"every": 1, "steps": 6, "inputs": "the same"}),
    "tiny_steps": (mlp, adam(1e-12), {"every": 1, "steps": 6}),
    "mostly_zero": (rain, adam(3e-3), {"every": 8, "steps": 80, "labels": "few"}),
    "fitted": (mlp, adam(1e-2), {"scale": 5.0, "steps": 80}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DEAD)
def test_a_network_that_is_dead_for_good_is_told(name, seed):
    make, optimizer, settings = DEAD[name]
    told, start, end = run(make, optimizer, seed=seed, **settings)
    assert end > 0.3 * start, "it trains: not what this test is about"
    assert told[-1] == 1 and told[0] < 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_is_not(name, seed):
    make, optimizer, settings = HEALTHY[name]
    told, _, _ = run(make, optimizer, seed=seed, **settings)
    assert not any(told)


def test_a_plateau_that_ends_is_none():
    """Sigmoids six layers deep: at chance for a long time, with outputs that differ by a millionth."""
    told, start, end = run(lambda: mlp(nn.Sigmoid, depth=4), adam(1e-2), scale=2.0, steps=320, every=20)
    assert not any(told) and end < 0.5 * start and math.log(CLASSES) * 0.9 < start
