"""Claim: 2 probes of 40 Lanczos steps tell all outliers that longer runs tell, and errors are those that are stated.

An MLP of 1,810 parameters on scikit-learn's digits, at three stages of a run; against all eigenvalues of the dense
Hessian. Root mean squares over starts: of the relative errors of ``tr H`` and ``tr H^2``, of *its error* as stated for
the first, of Kolmogorov's *distance* between the cumulatives, both smoothed by 2 % of the range, of how many *outliers*
are told, of how many eigenvalues beyond the bulk's edges are *missed* among them, and of how far the furthest of them
is *off* any eigenvalue, over the largest. Their number is not that of the classes (10), nor that less one: 6, 9 and 14
at the three stages, for the bulk shrinks while the classes are learned. Of 80 products, more probes of
fewer steps lose outliers; at the start, where the trace nearly cancels, they give it more exactly.
"""

import torch
from runs import digits
from torch import nn

from lsp_callbacks import Snapshot
from lsp_callbacks.functional import Spectrum, smoothed_cumulative, spectral_density
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators import hessian

STAGES, BATCH, STARTS = (0, 30, 200), 64, 12
SPLITS = ((2, 20), (2, 30), (2, 40), (4, 20), (8, 10), (2, 60), (4, 40))


def compare(found: Spectrum, values: torch.Tensor) -> list[float]:
    width = 0.02 * float(values[-1] - values[0])
    points = torch.linspace(float(values[0]), float(values[-1]), 400, dtype=torch.float64)
    dense = smoothed_cumulative(values, torch.full_like(values, 1 / len(values)), points, width)
    distance = (smoothed_cumulative(found.nodes, found.weights, points, width) - dense).abs().max()
    outliers = torch.empty(0) if found.outliers is None else found.outliers
    off = max((float((values - one).abs().min()) for one in outliers), default=0.0) / float(values[-1])
    missed = 0.0
    if found.bulk is not None:
        low, high = found.bulk
        beyond = (values < low - 1e-3 * values[-1]) | (values > high + 1e-3 * values[-1])
        missed = float(beyond.sum()) - len(outliers)
    total, square = float(values.sum()), float(values.square().sum())
    trace, frobenius = (found.trace - total) / total, (found.square - square) / square
    return [trace, found.trace_error / total, frobenius, float(distance), float(len(outliers)), missed, off]


def main() -> None:
    torch.manual_seed(0)
    x, y = digits().tensors
    x = x.flatten(1)
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    columns = ("step", "probes", "steps", "trace", "its error", "square", "distance", "outliers", "missed", "off")
    print(" ".join(f"{column:>9}" for column in columns))
    for step in range(STAGES[-1] + 1):
        batch = torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        if step in STAGES:
            replay = lambda b=batch: nn.functional.cross_entropy(net(x[b]), y[b])  # noqa: E731
            matrix = hessian(Snapshot(step, net, replay), method="exact").dense().detach().double()
            matrix = (matrix + matrix.mT) / 2
            values, operator = torch.linalg.eigvalsh(matrix), from_matrix(matrix)
            for probes, steps in SPLITS:
                seeds = [torch.Generator().manual_seed(seed) for seed in range(STARTS)]
                settings = {"probes": probes, "steps": steps}
                rows = [compare(spectral_density(operator, generator=seed, **settings), values) for seed in seeds]
                mean = torch.tensor(rows).square().mean(0).sqrt().tolist()
                print(f"{step:9d} {probes:9d} {steps:9d} " + " ".join(f"{value:9.3g}" for value in mean), flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
