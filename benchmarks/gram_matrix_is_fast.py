"""Claim: K of ten outputs costs an MLP less than a thirtieth of ``vmap(jacrev)``, and the memory of a few gradients.

64 samples x 10 outputs, squared loss. Prints the median ratio of interleaved repetitions, the largest difference of the
two K, and the peak of live CPU tensor memory (allocations less releases, from torch's profiler) beyond the start of the
call. The structured K of an MLP holds activations, output gradients, a few (640, 640) matrices, and for its own check
the gradient of the network, where Jacobians hold 640 of them; a convolution holds those of one layer.
"""

import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.profiler import ProfilerActivity, profile

from lsp_callbacks import ProbeSet
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.step.criterion import evaluation

SAMPLES, CLASSES = 64, 10


def mlp(*widths: int) -> nn.Module:
    sizes = (784, *widths)
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, CLASSES),
    )  # fmt: skip


def both(net: nn.Module) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """K by the package, and by per-sample Jacobians; ``sum((f - y)^2) / 2`` makes every output Hessian the identity."""
    x = torch.randn(SAMPLES, 1, 28, 28)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    part = lambda: evaluation(net(x), lambda f: f.square().sum() / (2 * SAMPLES), samples=SAMPLES)  # noqa: E731
    probes = ProbeSet(module=net, parts=(part,), samples=SAMPLES, batch_size=32)

    def jacobians() -> Tensor:
        found = vmap(jacrev(lambda w, one: functional_call(net, w, (one[None],))[0]), in_dims=(None, 0))(weights, x)
        rows = torch.cat([j.flatten(2) for j in found.values()], dim=2).flatten(0, 1)
        return rows @ rows.T

    return lambda: tangent_kernel(probes, outputs="all").gram, jacobians


def peak(work: Callable[[], object]) -> float:
    """MB."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 1e6


def main(repetitions: int = 15) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = {"MLP": mlp(100, 60), "MLP, ten times wider": mlp(640, 512), "CNN": cnn()}
    for name, net in nets.items():
        ours, theirs = both(net)
        size = f"{name}, {sum(p.numel() for p in net.parameters()):,} parameters"
        if "wider" in name:
            print(f"{size}: K takes {peak(ours):.0f} MB", flush=True)
            continue
        difference = float((ours() - theirs()).abs().max() / ours().abs().max())
        ratios = []
        for _ in range(repetitions):
            began = time.perf_counter()
            ours()
            middle = time.perf_counter()
            theirs()
            ratios.append((time.perf_counter() - middle) / (middle - began))
        print(
            f"{size}: vmap(jacrev) takes {median(ratios):.1f} times as long and {peak(theirs):.0f} MB where K takes "
            f"{peak(ours):.0f} MB; they differ by {difference:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
