"""Claim: one row a sample gives the Courant number of all rows within a seventh, 128 probes that of 1024 within twice.

Networks trained on the first 4000 test images of MNIST at a rate that trains well, for `STEPS` steps of batch 32;
Courant number ``lr / critical_lr`` by `outputs="top"` over that by "all" on the same 64 probes, and by 128 probes (mean
and spread over 8 disjoint sets) over that by 1024. The scan's own grid is a factor of 1.1 with interpolation.
"""

from collections.abc import Callable

import torch
from runs import Problem, mnist, network
from torch import Tensor, nn

from lsp_callbacks import ProbeSet
from lsp_callbacks.functional import UpdateRule, reduced_modes
from lsp_callbacks.functional.sgd.sgd_stability import critical_lr
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.step.criterion import evaluation

STEPS, BATCH, POPULATION = 1000, 32, 4000
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(f, y)


def squares(f: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(f, nn.functional.one_hot(y, 10).float())


def trained(net: nn.Module, loss: Loss, lr: float, momentum: float) -> None:
    x, y = mnist(POPULATION).tensors
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum)
    for _ in range(STEPS):
        batch = torch.randint(POPULATION, (BATCH,))
        optimizer.zero_grad()
        loss(net(x[batch]), y[batch]).backward()
        optimizer.step()


def courant(net: nn.Module, loss: Loss, lr: float, momentum: float, index: Tensor, outputs: str) -> float:
    x, y = (t[index] for t in mnist(POPULATION).tensors)
    part = lambda: evaluation(net(x), lambda f: loss(f, y), samples=len(x))  # noqa: E731
    probes = ProbeSet(module=net, parts=(part,), samples=len(x), batch_size=BATCH)
    kernel = tangent_kernel(probes, outputs=outputs)  # type: ignore[arg-type]
    modes = reduced_modes(kernel.gram, kernel.rows, tol=1e-6)
    rule = UpdateRule(momentum)
    return lr / critical_lr(modes, batch_size=BATCH, population=POPULATION, rule=rule, steps=100, tol=1e-4).value


def main() -> None:
    torch.manual_seed(0)
    for name, kind, loss, lr in (
        ("MLP, cross-entropy", "mlp", cross_entropy, 0.05),
        ("CNN, cross-entropy", "cnn", cross_entropy, 0.05),
        ("MLP, squared loss", "mlp", squares, 0.5),
    ):
        for momentum in (0.9, 0.0):
            net, rate = network(Problem(kind, nn.ReLU, lr)), lr * (1 - momentum)
            trained(net, loss, rate, momentum)
            order = torch.randperm(POPULATION)
            top, whole = (courant(net, loss, rate, momentum, order[:64], which) for which in ("top", "all"))
            many = courant(net, loss, rate, momentum, order[:1024], "top")
            few = torch.tensor([courant(net, loss, rate, momentum, part, "top") for part in order[:1024].split(128)])
            spread = ", ".join(f"{float(share) / many:.2f}" for share in (few.mean(), few.min(), few.max()))
            print(
                f"{name}, momentum {momentum}: Courant {whole:.2f}; top over all {top / whole:.2f}; "
                f"128 over 1024 probes (mean, least, most) {spread}",
                flush=True,
            )


if __name__ == "__main__":
    main()
