"""Claim: of a smooth loss, sharpness takes at least 3 times less time than the best peer at equal measured error.

At kinks, where products are exact, it is 2.5 times less.

One training run, read every so many steps; each library measures the same Hessian of the same batch, in turn, in the
same process, on one thread. Error: median over the readings of ``|value / truth - 1|``, against scipy's eigsh in
float64. Time: the processor's, summed over all readings (cold start included) and divided by their number, in units of
a gradient of the same batch. Peers are taken at several settings, and from their last eigenvector where their interface
takes one. The last column divides the least time of a peer whose error is at most ours by our time.

Peers are PyHessian, hessian-eigenthings and curvlinops with SciPy: ``pip install pyhessian hessian-eigenthings
curvlinops-for-pytorch``; one that is not installed is left out, with a message.

``python benchmarks/sharpness_against_peers.py [READINGS [EVERY]]``
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from runs import digits
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from sharpness_runs import exact_top
from torch import Tensor, nn

from lsp_callbacks import Sharpness
from lsp_callbacks.step.pending_step import PendingStep

Batch = tuple[Tensor, Tensor]


@dataclass
class Measured:
    """What one way of measuring gave along the run: values, seconds, and the vector to start from."""

    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start: object = None


Way = Callable[[nn.Module, Batch, Measured], float]


def pyhessian(net: nn.Module, batch: Batch, past: Measured, *, most: int) -> float:
    """Power iteration from a random vector: it takes no start."""
    training = net.training
    hessian = importlib.import_module("pyhessian").hessian(net, nn.CrossEntropyLoss(), data=batch, cuda=False)
    values, _ = hessian.eigenvalues(maxIter=most, tol=0.0 if most < 30 else 1e-4, top_n=1)
    net.train(training)
    return values[-1]


def eigenthings_power(net: nn.Module, batch: Batch, past: Measured, *, most: int) -> float:
    """Power iteration from the last vector."""
    peer = importlib.import_module("hessian_eigenthings")
    operator = peer.HessianOperator(net, [batch], peer.supervised_loss(nn.functional.cross_entropy))
    value, past.start, *_ = peer.power_iteration_one(operator, max_iter=most, tol=1e-8, init=past.start, seed=0)
    return float(value)


def eigenthings_lanczos(net: nn.Module, batch: Batch, past: Measured, *, most: int) -> float:
    """Lanczos from a random vector: it takes no start."""
    peer = importlib.import_module("hessian_eigenthings")
    operator = peer.HessianOperator(net, [batch], peer.supervised_loss(nn.functional.cross_entropy))
    found = peer.lanczos(operator, k=1, max_iter=most, which="LA", seed=0)
    return float(found.eigenvalues[0])


def curvlinops(net: nn.Module, batch: Batch, past: Measured, *, vectors: int, tol: float) -> float:
    """SciPy's eigsh on its operator, from the last vector."""
    peer = importlib.import_module("curvlinops")
    operator = peer.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [batch], check_deterministic=False
    ).to_scipy()
    try:
        values, found = eigsh(operator, k=1, which="LA", v0=past.start, ncv=vectors, tol=tol, maxiter=30)
    except ArpackNoConvergence as error:
        return float(error.eigenvalues[0]) if len(error.eigenvalues) else np.nan
    past.start = found[:, 0]
    return float(values[0])


#: By library: its settings, cheap to accurate.
PEERS: dict[str, dict[str, Way]] = {
    "pyhessian": {f"PyHessian, {n} iterations": partial(pyhessian, most=n) for n in (5, 10, 20, 50)},
    "hessian_eigenthings": {
        **{f"hessian-eigenthings, power, {n}": partial(eigenthings_power, most=n) for n in (3, 6, 12, 25)},
        **{f"hessian-eigenthings, Lanczos, {n}": partial(eigenthings_lanczos, most=n) for n in (4, 6, 8, 12)},
    },
    "curvlinops": {
        f"curvlinops, eigsh, ncv {ncv}, tol {tol:g}": partial(curvlinops, vectors=ncv, tol=tol)
        for ncv, tol in ((3, 0.3), (4, 0.1), (6, 0.1), (10, 1e-2))
    },
}


def peers() -> dict[str, Way]:
    """Return the ways of the libraries that are installed."""
    ways: dict[str, Way] = {}
    for module, settings in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"left out: {module} ({error})", file=sys.stderr)
        else:
            ways |= settings
    return ways


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def timed(work: Callable[[], float]) -> tuple[float, float]:
    began = time.process_time()
    value = work()
    return value, time.process_time() - began


def gradient(net: nn.Module, batch: Batch) -> float:
    torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
    return 0.0


def along_a_run(
    act: type[nn.Module], momentum: float, count: int, every: int
) -> tuple[list[float], dict[str, Measured], float]:
    """Return the truths, what each way measured, and the seconds of a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 10)
    )  # fmt: skip
    x, y = digits().tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=momentum)
    ours = {"ours": Sharpness(), "ours, bounded": Sharpness(bounded=True)}
    ways = peers()
    results = {name: Measured() for name in (*ours, *ways)}
    truths: list[float] = []
    units: list[float] = []
    for step in range(count * every):
        rows = torch.randperm(len(x))[:256]
        batch = (x[rows], y[rows])
        pending = PendingStep(net)
        pending.add(batch, loss_of)
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        if step % every == 0:
            state = torch.random.get_rng_state()
            gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
            truths.append(float(exact_top(net, lambda module, b=batch: loss_of(module, (b[0].double(), b[1])))[0]))
            units.append(min(timed(partial(gradient, net, batch))[1] for _ in range(5)))
            for name, metric in ours.items():  # a snapshot each, so that nothing is shared
                snapshot = pending.snapshot(step, optimizer, loss=loss.detach().clone())
                value, seconds = timed(lambda m=metric, s=snapshot: float(m(s)["stability/sharpness"]))
                results[name].values.append(value), results[name].seconds.append(seconds)
            for name, way in ways.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    value, seconds = timed(partial(way, net, batch, results[name]))
                results[name].values.append(value), results[name].seconds.append(seconds)
            for name, p in net.named_parameters():
                p.grad = gradients[name]
            torch.random.set_rng_state(state)
        optimizer.step()
    return truths, results, float(np.median(units))


def table(act: type[nn.Module], momentum: float, count: int, every: int) -> list[str]:
    truths, results, unit = along_a_run(act, momentum, count, every)
    lines = ["| | error, median | 90 % of readings | gradients a reading | ms |", "|---|---|---|---|---|"]
    errors = {name: np.abs(np.array(m.values) / np.array(truths) - 1) for name, m in results.items()}
    spent = {name: float(np.mean(m.seconds)) for name, m in results.items()}
    for name, error in errors.items():
        lines.append(
            f"| {name} | {np.median(error):.2%} | {np.quantile(error, 0.9):.1%} | {spent[name] / unit:.1f} "
            f"| {1e3 * spent[name]:.0f} |"
        )
    for own in ("ours", "ours, bounded"):
        equal = [
            spent[name]
            for name in results
            if not name.startswith("ours") and np.median(errors[name]) <= np.median(errors[own])
        ]
        if equal:
            lines.append(f"\n{own}: {min(equal) / spent[own]:.1f} times less time than the best peer at its error")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = [int(argument) for argument in sys.argv[1:]]
    count, every = (numbers + [20, 25][len(numbers) :])[:2]
    for act, momentum in ((nn.Tanh, 0.0), (nn.ReLU, 0.9)):
        print(f"\n{act.__name__}, momentum {momentum:g}, {count} readings, every {every} steps:\n")
        print("\n".join(table(act, momentum, count, every)), flush=True)
