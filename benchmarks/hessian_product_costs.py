"""Claim: in gradients, a Hessian product by a difference costs 1.2, an exact one 3.3, the next on the same step 2.

These are the numbers of the cost model (`lsp_callbacks.operators.curvature.hessian.product_cost`); exact products
keep within 40 % of them. The first difference of a step takes one or two gradients more, which tell how far to go, and
along random directions of a network with little curvature (here the MLP) the next ones take one more, too. Medians of
interleaved repetitions, of the processor's time, as ratios to a gradient of the same step.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from lsp_callbacks import Snapshot
from lsp_callbacks.operators import hessian
from lsp_callbacks.operators.curvature.hessian import Method

MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "MLP 784-256-256-10, batch 128": (
        nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)),
        (128, 784),
    ),
    "CNN 1-16-32, batch 64": (
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.GELU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
        ),
        (64, 1, 28, 28),
    ),
    "transformer d 64, batch 32": (
        nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu"), nn.Flatten(),
                      nn.Linear(32 * 64, 10)),
        (32, 32, 64),
    ),
}  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def product(step: Snapshot, method: Method, v: Tensor) -> Tensor:
    return hessian(step, method=method) @ v


def main(repetitions: int = 30) -> None:
    torch.manual_seed(0)
    print(f"{'in gradients':32s} {'exact, first':>12s} {'exact, next':>12s} {'difference':>12s} {'its next':>12s}")
    for name, (net, shape) in MODELS.items():
        x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
        parameters = list(net.parameters())

        def loss(net=net, x=x, y=y) -> torch.Tensor:
            torch.manual_seed(1)
            return nn.functional.cross_entropy(net(x), y)

        def gradient(loss=loss, parameters=parameters):
            return torch.autograd.grad(loss(), parameters)

        own = dict(zip((name for name, _ in net.named_parameters()), gradient()))
        n = sum(p.numel() for p in parameters)
        times: dict[str, list[float]] = {"gradient": [], "first": [], "next": [], "difference": [], "its next": []}
        for _ in range(repetitions):
            step = Snapshot(step=0, module=net, replay=loss, loss=loss().detach(), gradient=own)
            times["gradient"].append(seconds(gradient))
            for method, names in (("exact", ("first", "next")), ("finite_difference", ("difference", "its next"))):
                for name in names:  # along another vector each time, as Lanczos does
                    times[name].append(seconds(partial(product, step, method, torch.randn(n))))
        unit = median(times.pop("gradient"))
        print(f"{name:32s} " + " ".join(f"{median(t) / unit:12.2f}" for t in times.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
