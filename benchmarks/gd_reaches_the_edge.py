"""Claim: full-batch gradient descent drives its Courant number to 1. No Lightning needed.

Cohen et al. 2021 on a regression small enough to watch: the sharpness rises until it meets 2 / lr, and stays there.
"""

import torch
from torch import nn

from lsp_callbacks import Monitor, Sharpness, Snapshot

torch.manual_seed(0)
x = torch.linspace(-1, 1, 20).unsqueeze(1)
y = 8 * x**4 - 8 * x**2 + 1
net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
monitor = Monitor(Sharpness(), every_n_steps=200)


def loss() -> torch.Tensor:
    return nn.functional.mse_loss(net(x), y)


for step in range(4001):
    optimizer.zero_grad()
    loss().backward()
    observation = monitor.observe(Snapshot(step=step, module=net, replay=loss, optimizer=optimizer))
    if observation and step % 1000 == 0:
        sharpness, courant = (observation.values[f"stability/{key}"] for key in ("sharpness", "courant_gd"))
        print(f"step {step:4d}  loss {loss():.4f}  sharpness {sharpness:5.2f} of {2 / 0.2:.0f}  Courant {courant:.3f}")
    optimizer.step()
