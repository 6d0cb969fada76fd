"""Ten runs along which sharpness is read: what they train, and the exact top of each reading's Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from runs import digits
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from lsp_callbacks import Snapshot

Loss = Callable[[nn.Module], Tensor]
SGD, AdamW, Adam = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam
T, R = nn.Tanh, nn.ReLU


def mlp(act: type[nn.Module], width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), act(), nn.Linear(width, 10))


def deep(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), act(), nn.Linear(24, 24), act(), nn.Linear(24, 10))


def cnn(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), act(), nn.Conv2d(6, 8, 3, padding=1), act(), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def curve(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(1, 24), act(), nn.Linear(24, 24), act(), nn.Linear(24, 1))


@dataclass(frozen=True)
class Run:
    """A training run that is read every ``every`` steps.

    Attributes:
        net: makes the network.
        optimizer: makes the optimizer.
        batch: None is full batch.
        every: steps between readings.
        samples: of digits; 0 fits a Chebyshev polynomial of one variable.
        squared: squared loss instead of cross-entropy.
        ramp: factor of the rate over the run.
    """

    net: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch: int | None = 64
    every: int = 5
    samples: int = 1797
    squared: bool = False
    ramp: float = 1.0


RUNS = {
    "tanh MLP, SGD": Run(partial(mlp, T), partial(SGD, lr=0.2)),
    "ReLU MLP, SGD, every 40 steps": Run(partial(deep, R), partial(SGD, lr=0.1), every=40),
    "tanh MLP, momentum, at its edge": Run(partial(mlp, T, 48), partial(SGD, lr=0.54, momentum=0.9)),
    "ReLU MLP, momentum, ramp": Run(partial(deep, R), partial(SGD, lr=0.003, momentum=0.9), 32, 8, ramp=30.0),
    "tanh MLP, GD, edge of stability": Run(partial(mlp, T), partial(SGD, lr=1.2), None, 5, 200, squared=True),
    "tanh curve, GD, edge of stability": Run(partial(curve, T), partial(SGD, lr=0.2), None, 20, 0, squared=True),
    "ReLU CNN, SGD, every step": Run(partial(cnn, R), partial(SGD, lr=0.1), 32, 1),
    "tanh CNN, momentum": Run(partial(cnn, T), partial(SGD, lr=0.05, momentum=0.9), every=10),
    "tanh MLP, AdamW": Run(partial(deep, T), partial(AdamW, lr=0.003), every=10),
    "ReLU CNN, Adam, squared loss": Run(partial(cnn, R), partial(Adam, lr=0.003), 32, 20, squared=True),
}


def data(run: Run) -> tuple[Tensor, Tensor]:
    if not run.samples:
        x = torch.linspace(-1, 1, 20)[:, None]
        return x, 8 * x**4 - 8 * x**2 + 1
    x, y = digits().tensors
    x, y = x[: run.samples], y[: run.samples]
    return x, nn.functional.one_hot(y, 10).float() if run.squared else y


def readings(run: Run, seed: int, count: int = 100) -> Iterator[tuple[Snapshot, Loss]]:
    """Take the run's steps; hand out every ``every``-th before its update, with the loss as a function of a module."""
    torch.manual_seed(seed)
    net, (x, y) = run.net(), data(run)
    optimizer = run.optimizer(net.parameters())
    criterion = nn.functional.mse_loss if run.squared else nn.functional.cross_entropy
    first = [group["lr"] for group in optimizer.param_groups]
    steps = run.every * count
    for step in range(steps):
        rows = torch.arange(len(x)) if run.batch is None else torch.randperm(len(x))[: run.batch]
        loss_of = lambda module, rows=rows: criterion(  # noqa: E731
            module(x[rows].to(next(module.parameters()).dtype)),
            y[rows] if not run.squared else y[rows].to(next(module.parameters()).dtype),
        )
        for group, lr in zip(optimizer.param_groups, first):
            group["lr"] = lr * run.ramp ** (step / steps)
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        if step % run.every == 0:
            gradient = {name: p.grad.clone() for name, p in net.named_parameters()}
            replay = lambda loss_of=loss_of: loss_of(net)  # noqa: E731
            snapshot = Snapshot(
                step=step, module=net, replay=replay, optimizer=optimizer, loss=loss.detach(), gradient=gradient
            )
            yield snapshot, loss_of
        optimizer.step()


def exact_top(module: nn.Module, loss_of: Loss, root: Tensor | None = None, count: int = 1) -> np.ndarray:
    """The largest algebraic eigenvalues of ``root H root``, descending, by eigsh on products in float64."""
    net = copy.deepcopy(module).double()
    parameters = list(net.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(net), parameters, create_graph=True)])
    scale = torch.ones_like(gradient.detach()) if root is None else root.double()

    def product(v: np.ndarray) -> np.ndarray:
        inner = gradient @ (scale * torch.as_tensor(np.asarray(v).ravel()))
        parts = torch.autograd.grad(inner, parameters, retain_graph=True)
        return (scale * torch.cat([p.reshape(-1) for p in parts])).numpy()

    n = len(gradient)
    found = eigsh(
        LinearOperator((n, n), matvec=product, dtype=np.float64), k=count, which="LA", tol=1e-8, ncv=min(n, 24),
        return_eigenvectors=False, v0=gradient.detach().numpy() + 1e-3 * np.random.default_rng(0).normal(size=n),
    )  # fmt: skip
    return np.sort(found)[::-1]
