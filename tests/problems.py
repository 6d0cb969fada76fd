"""Problems that carry their exact answers.

The numbers were computed independently of this package, from the formulas beside them, and are exact to the digits
shown. A problem is a module whose forward pass is its loss, so that it can be trained, replayed and differentiated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsp_callbacks import ProbeSet, Snapshot
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.run_context import RunContext

f64 = torch.float64


def close(actual: Any, expected: Any, tol: float | Tensor) -> None:
    """Equal up to ``tol``, absolute, or relative where the numbers exceed 1."""
    actual, expected = (torch.as_tensor(value, dtype=f64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=float(tol), atol=float(tol))


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, NaN being equal to NaN, through dicts and sequences."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(1e300), b.nan_to_num(1e300))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=f64)


def symmetric(spectrum: list[float], seed: int = 0) -> Tensor:
    """A dense symmetric matrix with the given eigenvalues."""
    q, _ = torch.linalg.qr(random(len(spectrum), len(spectrum), seed=seed))
    return q @ torch.diag(torch.tensor(spectrum, dtype=f64)) @ q.T


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


# Losses -------------------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """``theta^T H theta / 2`` with theta cut into parameters of the given sizes: the Hessian is H everywhere."""

    def __init__(self, curvature: Tensor, sizes: tuple[int, ...] | None = None):
        super().__init__()
        self.register_buffer("curvature", curvature)
        self.parts = nn.ParameterList(random(n, seed=i) for i, n in enumerate(sizes or (len(curvature),)))

    def forward(self) -> Tensor:
        theta = torch.cat(list(self.parts))
        return theta @ self.curvature @ theta / 2


class Regression(nn.Module):
    """Half the mean square of ``net(x) - y`` over the rows that are asked for."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor):
        super().__init__()
        self.net = net
        self.register_buffer("x", x)
        self.register_buffer("y", y)

    def forward(self, rows: slice = slice(None)) -> Tensor:
        return 0.5 * (self.net(self.x[rows]) - self.y[rows]).square().sum(-1).mean()


def tanh_mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return seeded(nn.Sequential(*layers[:-1]), seed)


def seeded(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64, all its parameters and statistics drawn anew without touching the global random state."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            scale = 0.7 / math.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 0.3
            noise = scale * torch.randn(tensor.shape, dtype=f64, generator=generator)
            # Variances stay positive, gains of norms near 1.
            tensor.copy_(1 + noise.abs() if name.endswith("var") or (tensor.ndim == 1 and "weight" in name) else noise)
    return module


def regression(samples: int = 6, seed: int = 0) -> Regression:
    """A tanh network with 21 parameters, far from interpolation: its Hessian has eigenvalues of both signs."""
    return Regression(tanh_mlp(2, 4, 1, 2, seed=seed), random(samples, 2, seed=seed + 1), random(samples, 2, seed=seed))


def interpolating_tanh() -> tuple[Regression, float]:
    """A network that fits its data, and its sharpness: the top eigenvalue of K / N, K the tangent kernel."""
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    theta = torch.tensor([1.2 * math.sin(1.7 * k**1.1) for k in range(1, 22)], dtype=f64)
    nn.utils.vector_to_parameters(theta, net.parameters())
    x = matrix([[math.cos(k + 0.3), math.sin(2 * k + 1)] for k in range(4)])
    return Regression(net, x, net(x).detach()), 3.8207521245901077


class MeanSquare(Regression):
    """``MSELoss``, without the half."""

    def forward(self, rows: slice = slice(None)) -> Tensor:
        return 2 * super().forward(rows)


def chebyshev(seed: int) -> Regression:
    """Full-batch GD at rate 0.2 on this reaches the edge of stability, from nn.Linear's own initialisation."""
    x = torch.linspace(-1, 1, 20, dtype=f64)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    return MeanSquare(net.double(), x, 8 * x**4 - 8 * x**2 + 1)


def dense_hessian(problem: nn.Module) -> Tensor:
    """Brute force on a flat vector of the trainable parameters (torch.func's is wrong behind norms in torch 2.13)."""
    parameters = {name: p.detach() for name, p in problem.named_parameters() if p.requires_grad}

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in parameters.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts)}
        buffers = {name: b.clone() for name, b in problem.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(problem, buffers | named, ())

    return hessian(loss, torch.cat([p.reshape(-1) for p in parameters.values()]))


# Training steps -----------------------------------------------------------------------------------------------------


RUN = {field.name for field in fields(RunContext)}


def freeze(
    problem: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    replay: Callable[[], Tensor] | None = None,
    **settings: Any,
) -> Snapshot:
    """The step that the optimizer is about to take, with its loss and gradient; settings of the run go into it."""
    run = RunContext(**{name: settings.pop(name) for name in RUN & settings.keys()})
    replay = replay or problem
    loss = replay()
    parameters = {name: p for name, p in problem.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = {name: g for name, g in zip(parameters, gradient)}
    return Snapshot(
        **{"step": 0, "module": problem, "replay": replay, "optimizer": optimizer, "loss": loss.detach()}
        | {"gradient": named, "run": run}
        | settings
    )


def take(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One real step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def trajectory(problem: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **settings: Any) -> Iterator[Snapshot]:
    """Consecutive frozen steps of a real run on the full batch, each before its update."""
    for step in range(steps):
        yield freeze(problem, optimizer, step=step, **settings)
        take(optimizer, problem())


# Residual blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResidualCase:
    """``x + h g(x)`` with ``G = dg/dx``; ``m = -lambda_max((G + G^T)/2)``, ``M = ||G||``, ``h_max = 2 m / M^2``."""

    G: Tensor
    m: float
    M: float
    h_max: float | None = None
    h_exact: float | None = None


RESIDUAL = {
    "rotation_and_decay": ResidualCase(
        matrix([[-0.5, 2.0], [-2.0, -0.5]]), 0.5, 2.0615528128088303, 0.23529411764705882, 0.23529411764705882
    ),
    "diagonal": ResidualCase(matrix([[-1, 0], [0, -10]]), 1.0, 10.0, 0.02, 0.2),
    "not_dissipative": ResidualCase(matrix([[-1, 3], [0, -1]]), -0.5, 3.3027756377319943),
}
NORM_I_PLUS_HALF_G = 1.6513878188659972  # of "not_dissipative"


class TanhBranch(nn.Module):
    """``x - h W^T tanh(W x)``, dissipative everywhere; the answers are for ``point``."""

    A = matrix([[1, 0.5], [-0.3, 1.2], [0.8, -0.4]])
    point = matrix([[0.2, -0.1]])
    answers = ResidualCase(
        -A.T @ torch.diag(1 - torch.tanh(A @ point[0]) ** 2) @ A,
        1.559891907578873,
        1.9127134599959337,
        0.8527557816394183,
        1.0456349274628158,
    )

    def __init__(self, h: float):
        super().__init__()
        self.h = h
        self.W = nn.Parameter(self.A.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.h * (-torch.tanh(x @ self.W.T) @ self.W)


# Layers -------------------------------------------------------------------------------------------------------------

#: A 3 x 3 kernel on a 1 x 8 x 8 input with padding 1: the norm by (padding_mode, stride).
KERNEL = matrix([[1, 2, -1], [0, 3, 1], [-2, 1, 0.5]])
CONVOLUTION_NORM = {
    ("zeros", 1): 8.158357690060411,
    ("zeros", 2): 5.274387390771137,
    ("circular", 1): 8.555181207721693,
    ("circular", 2): 5.590169943749474,
}
RESHAPED_KERNEL_NORM = 4.609772228646444  # of the 1 x 9 matrix: not the norm of any of them

QUARTER_TURN = matrix([[0, -1], [1, 0]])


def rotation(angle: float) -> Tensor:
    return matrix([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


@dataclass(frozen=True)
class Feedforward:
    """Linear layers; ``bound`` is ``(1/L) sum log ||W_k||``, ``actual`` is ``(1/L) log ||W_L ... W_1||``."""

    layers: list[Tensor]
    bound: float
    actual: float


FEEDFORWARD = {
    "rotations_times_0.8": Feedforward(
        [0.8 * rotation(0.3 + k) for k in range(5)], -0.2231435513142097, -0.2231435513142097
    ),
    "diagonal_times_quarter_turn": Feedforward(
        [torch.diag(torch.tensor([1.2, 0.3], dtype=f64)) @ QUARTER_TURN] * 4, 0.1823215567939546, -0.5108256237659906
    ),
}

# Exponents ----------------------------------------------------------------------------------------------------------

JORDAN = matrix([[1, 1], [0, 1]])
JORDAN_NORMS = {10: 10.099019513592786, 100: 100.00999900019995, 1000: 1000.0009999990001}  # the exponent is 0

#: Drawn with probability 1/2 each.
POSITIVE_PAIR = (matrix([[2, 1], [1, 1]]), matrix([[3, 1], [2, 1]]))
POSITIVE_PAIR_EXPONENT = 1.1433110351029

#: 2 x 2 with iid N(0, 1) entries: ``(log 2 + digamma(d/2)) / 2`` for d = 2 and d = 1.
GAUSSIAN_EXPONENTS = (0.0579658, -0.6351814)

#: beta = 0.9, lr = 0.1: the exponent by curvature.
MOMENTUM_EXPONENTS = {5.0: -0.0526803, 0.02: -0.0268417, 39.0: 0.2747699}
#: beta = 0.9: lr times curvature at the edge, by (dampening, nesterov).
MOMENTUM_EDGES = {(0.0, False): 3.8, (0.0, True): 1.357142857142857, (0.9, False): 38.0}
#: beta = 0.9, windows of 4: lr * curvature -> the growth of ||(v, lr m)|| from m = 0, which is *not* the exponent.
TRANSIENT_GROWTH = {3.0: 0.23, 3.5: 0.378, 3.79: 0.668}
UNDERDAMPED_EXPONENT = -0.0526803  # 0.5 log beta, for each of them

# Error bars: AR(1) with rho = 0.9, unit innovations and n = 2000 -----------------------------------------------------

AR1_STANDARD_ERROR = 0.22308
AR1_NAIVE = 0.051
AR1_BATCH_MEANS = (0.209, 0.034)  # mean and sd over series, with 20 blocks


def ar1(series: int, n: int = 2000, rho: float = 0.9) -> Tensor:
    """``(n, series)``, stationary."""
    noise = random(n, series, seed=1)
    values = [noise[0] / math.sqrt(1 - rho**2)]
    for innovation in noise[1:]:
        values.append(rho * values[-1] + innovation)
    return torch.stack(values)


class Task(nn.Module):
    """A mean square of a network's outputs."""

    def __init__(self, net, *shape, dtype=torch.float64):
        super().__init__()
        self.net = seeded(net)
        self.register_buffer("x", random(*shape) if dtype.is_floating_point else torch.arange(12).view(3, 4) % 5)

    def forward(self):
        return self.net(self.x.clone()).square().mean()


class Functional(nn.Module):
    """Activations that are no modules, and one layer twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu_(self.first(x))
        for _ in range(2):
            x = torch.tanh(self.again(x))
        return self.last(x)


class Written(optim.Optimizer):
    """By a user: plain momentum, with a state of its own name; ``update`` is what a subclass changes."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def update(self, p, state):
        m = state["speed"] = 0.5 * state.get("speed", torch.zeros_like(p)) + p.grad
        return m

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.update(p, self.state[p]))


def probes_of(task):
    """All six samples, in batches of two."""
    part = lambda: evaluation(task.net(task.x), lambda f: 0.5 * (f - task.y).square().mean(), samples=6)  # noqa: E731
    return ProbeSet(module=task, parts=(part,), samples=6, batch_size=2, population=6)
