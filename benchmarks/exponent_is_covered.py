"""Claim: the bounds of the sharp-mode exponent hold the truth as often as they say, and its sign is right.

Found: on random quadratics in float32, where all windows coincide and Student's width is 0, and on small networks that
are trained by gradient descent with and without momentum, each one-sided 90 % bound holds at least as often; where
``|1 - courant_gd|`` is above ``sharpness_residual`` the sign is that of the truth.

The truth of a quadratic is ``log rho`` of the companion matrix at its largest eigenvalue. That of a network is taken in
float64: each step's dense Jacobian, over all parameters and the whole state, restricted to the plane of the exact
sharpest mode of the first step of the window; ``log rho`` of the product over the steps, averaged over the windows that
the quantity averages. Where the Hessian hardly moves (60 steps later) it is also compared with what knows of no mode at
all: the product of the companion matrices at each step's own largest eigenvalue.

``python benchmarks/exponent_is_covered.py`` prints the table of the ``.md``; the first seed and the number of
quadratics, three times that of the networks, may be given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsp_callbacks import Lyapunov, Sharpness, Snapshot

#: How many windows each problem is followed through.
WINDOWS = 3
HEAD = "| problems | lower holds | upper holds | needed | sign right | largest error | median width |"


class Loss(nn.Module):
    """A module whose forward pass is its loss."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor):
        super().__init__()
        self.net = net
        self.register_buffer("x", x)
        self.register_buffer("y", y)

    def forward(self) -> Tensor:
        return 0.5 * (self.net(self.x) - self.y).square().sum(-1).mean()


class Quadratic(nn.Module):
    """``theta^T H theta / 2``."""

    def __init__(self, curvature: Tensor, start: Tensor):
        super().__init__()
        self.curvature, self.theta = curvature, nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.theta @ self.curvature @ self.theta / 2


def spectrum(rng: np.random.Generator, kind: int, n: int) -> np.ndarray:
    """Uniform with negative ones, a power law, two that nearly coincide, or Wishart's."""
    if kind == 0:
        values = rng.uniform(-0.3, 1, n)
    elif kind == 1:
        values = (1.0 + np.arange(n)) ** -rng.uniform(0.3, 2.0)
    elif kind == 2:
        values = np.concatenate([[1, 1 - rng.uniform(0, 0.1)], rng.uniform(0, 0.3, n - 2)])
    else:
        factor = rng.normal(size=(n, n))
        values = np.linalg.eigvalsh(factor @ factor.T)
    return values / values.max() * 10 ** rng.uniform(-2, 2)


def steps(problem: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> Iterator[Snapshot]:
    """Consecutive steps of a real run on the full batch, each before its update."""
    for step in range(count):
        optimizer.zero_grad()
        loss = problem()
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in problem.named_parameters()}
        yield Snapshot(
            step=step, module=problem, replay=problem, optimizer=optimizer, loss=loss.detach(), gradient=gradient
        )
        optimizer.step()


def begin(problem: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    """Take the first steps: before them there is no momentum."""
    for _ in steps(problem, optimizer, count):
        pass


def companion(x: float, beta: float) -> float:
    matrix = [[1 + beta - x, -beta], [1, 0]] if beta else [[1 - x]]
    return math.log(np.abs(np.linalg.eigvals(matrix)).max())


def quadratic(seed: int, method: str) -> dict[str, float]:
    """One random quadratic, and what is told of it after three windows."""
    rng = np.random.default_rng(seed)
    n, beta = int(rng.integers(3, 120)), float(rng.choice([0.0, 0.9]))
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    H = torch.tensor(q @ np.diag(spectrum(rng, seed % 4, n)) @ q.T, dtype=torch.float32)
    H = (H + H.T) / 2
    top = float(torch.linalg.eigvalsh(H.double())[-1])
    share = rng.uniform(0.05, 1.3)
    problem = Quadratic(H, torch.tensor(rng.normal(size=n), dtype=torch.float32))
    optimizer = torch.optim.SGD(problem.parameters(), lr=share * (2 + 2 * beta) / top, momentum=beta)
    exponent, sharpness = Lyapunov(method=method), Sharpness(method=method)
    begin(problem, optimizer)
    for snapshot in steps(problem, optimizer, WINDOWS * exponent.window):
        if snapshot.step % exponent.window == 0:
            sharpness.update(snapshot)
        exponent.update(snapshot)
    truth = companion(share * (2 + 2 * beta), beta)
    return told(exponent, sharpness) | {"truth": truth}


def network(seed: int, method: str, *, late: bool = False) -> dict[str, float]:
    """One network along three windows; the dense truth is that of the same weights in float64."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    width, beta = int(rng.integers(4, 10)), float(rng.choice([0.0, 0.9]))
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    problem = Loss(net, torch.randn(12, 2), torch.randn(12, 2))
    share, first = rng.uniform(0.05, 1.3), float(torch.linalg.eigvalsh(dense(problem))[-1])
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.5 / first, momentum=beta)
    begin(problem, optimizer, 60 if late else 1)
    if late:
        first = float(torch.linalg.eigvalsh(dense(problem))[-1])
    lr = optimizer.param_groups[0]["lr"] = share * (2 + 2 * beta) / first
    exponent, sharpness = Lyapunov(method=method), Sharpness(method=method)
    truths: list[float] = []
    mode, product = torch.empty(0), torch.eye(1)
    for snapshot in steps(problem, optimizer, WINDOWS * exponent.window):
        H = dense(problem)
        values, vectors = torch.linalg.eigh(H)
        if snapshot.step % exponent.window == 0:
            sharpness.update(snapshot)
            mode, product = vectors[:, -1], torch.eye(2 if beta else 1, dtype=torch.float64)
        x = lr * float(values[-1] if late else mode @ H @ mode)
        product = step_along(x, beta) @ product
        if snapshot.step % exponent.window == exponent.window - 1:
            truths.append(float(torch.linalg.eigvals(product).abs().max().log()) / exponent.window)
        exponent.update(snapshot)
    return told(exponent, sharpness) | {"truth": float(np.mean(truths))}


def step_along(x: float, beta: float) -> Tensor:
    """Of ``(v, lr m)`` along a unit vector u: what is left of ``[[1 - lr H, -beta], [lr H, beta]]``, x = lr u H u."""
    if not beta:
        return torch.tensor([[1 - x]], dtype=torch.float64)
    return torch.tensor([[1 - x, -beta], [x, beta]], dtype=torch.float64)


def dense(problem: Loss) -> Tensor:
    """The Hessian at the same weights, in float64."""
    named = {name: p.detach().double() for name, p in problem.named_parameters()}
    buffers = {name: b.double() for name, b in problem.named_buffers()}

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        shaped = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
        return functional_call(problem, buffers | shaped, ())

    return torch.autograd.functional.hessian(loss, torch.cat([p.reshape(-1) for p in named.values()]))


def told(exponent: Lyapunov, sharpness: Sharpness) -> dict[str, float]:
    """The last readings, by the names of their keys."""
    values = exponent.compute() | sharpness.compute()
    return {key.split("/")[1]: float(value) for key, value in values.items()}


def row(name: str, found: list[dict[str, float]]) -> str:
    lower = sum(one["lyapunov_lower"] <= one["truth"] for one in found)
    upper = sum(one["truth"] <= one["lyapunov_upper"] for one in found)
    n = len(found)
    needed = 0.9 * n - 3 * math.sqrt(0.09 * n)
    clear = [one for one in found if abs(1 - one["courant_gd"]) > one["sharpness_residual"]]
    right = sum((one["lyapunov"] > 0) == (one["truth"] > 0) for one in clear)
    largest = max(abs(one["lyapunov"] - one["truth"]) for one in found)
    width = np.median([one["lyapunov_upper"] - one["lyapunov_lower"] for one in found])
    return (
        f"| {name} | {lower} of {n} | {upper} of {n} | {needed:.0f} | {right} of {len(clear)} | {largest:.2f} "
        f"| {width:.2g} |"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, most = (int(a) for a in (*sys.argv[1:], *("0", "300")[len(sys.argv) - 1 :]))
    many, few = range(first, first + most), range(first, first + most // 3)
    print(HEAD, "|---" * (HEAD.count("|") - 1) + "|", sep="\n")
    for method in ("exact", "finite_difference"):
        print(row(f"{len(many)} quadratics, {method}", [quadratic(seed, method) for seed in many]), flush=True)
        print(row(f"{len(few)} networks, {method}", [network(seed, method) for seed in few]), flush=True)
        late = [network(seed, method, late=True) for seed in few]
        print(row(f"{len(few)} networks, 60 steps later, {method}", late), flush=True)
