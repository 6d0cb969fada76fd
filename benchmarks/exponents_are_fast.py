"""Claim: lambda from K costs a hundredth of multiplying dense steps.

A curve of 32 rates costs less than four points where each sample has one row, and the mean-square rate of 64 samples 20
times one ``eigh`` of K (Nesterov 35). With ten rows a sample a curve costs ten to thirty points: 32 rates are 32 times the multiplications, and a single
rate is no longer bound by memory.

Medians of interleaved repetitions, one thread. The dense side forms ``I - (lr / B) M_B K`` and multiplies it into a
product of 640 x 640 matrices, for one chain and a few steps; its time is multiplied up to 8 chains x 1000 steps.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from lsp_callbacks import ProbeSet
from lsp_callbacks.functional import Modes, UpdateRule, reduced_modes, sgd_exponent
from lsp_callbacks.functional.sgd.mean_square import mean_square_lr
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.step.criterion import evaluation

SAMPLES, CLASSES, BATCH, CHAINS, STEPS = 64, 10, 32, 8, 1000


def gram(outputs: str, samples: int = SAMPLES) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, CLASSES)).double()
    x, y = torch.randn(samples, 784).double(), torch.randn(samples, CLASSES).double()
    part = lambda: evaluation(net(x), lambda f: nn.functional.mse_loss(f, y), samples=samples)  # noqa: E731
    probes = ProbeSet(module=net, parts=(part,), samples=samples, batch_size=BATCH)
    return tangent_kernel(probes, outputs=outputs).gram  # type: ignore[arg-type]


def ratio(slow: Callable[[], object], fast: Callable[[], object], repetitions: int) -> float:
    """Of the median times."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for work, own in zip((slow, fast), times):
            began = time.perf_counter()
            work()
            own.append(time.perf_counter() - began)
    return median(times[0][1:]) / median(times[1][1:])


def dense(K: torch.Tensor, lr: float, steps: int) -> None:
    """The product of ``steps`` random steps of one chain, renormalised."""
    product = torch.eye(len(K), dtype=K.dtype)
    for _ in range(steps):
        drawn = torch.zeros(SAMPLES, dtype=K.dtype)
        drawn[torch.randperm(SAMPLES)[:BATCH]] = lr / BATCH
        product = (torch.eye(len(K), dtype=K.dtype) - drawn.repeat_interleave(CLASSES)[:, None] * K) @ product
        product /= torch.linalg.matrix_norm(product)


def main(repetitions: int = 15, few: int = 5) -> None:
    torch.set_num_threads(1)
    K = gram("all")
    modes = reduced_modes(K, CLASSES)
    run = {"batch_size": BATCH, "chains": CHAINS, "steps": STEPS, "burn_in": 0}
    few_steps = ratio(lambda: dense(K, 0.1, few), lambda: sgd_exponent(modes, 0.1, **run), 3)
    print(f"dense products, r = {modes.rank}: {few_steps * CHAINS * STEPS / few:.0f} times as long (from {few} steps)")
    for outputs, samples in (("top", 64), ("top", 128), ("top", 640), ("all", 64)):
        K, rows = gram(outputs, samples), CLASSES if outputs == "all" else 1
        for name, rule in (("SGD", UpdateRule()), ("momentum 0.9", UpdateRule(0.9))):
            few_times = repetitions if len(K) < 640 else 3
            print(f"{samples} samples of {rows} rows, {name}: {curve_costs(reduced_modes(K, rows), rule, few_times)}")
    nesterov = UpdateRule(0.9, nesterov=True)
    for name, rule in (("SGD", UpdateRule()), ("momentum 0.9", UpdateRule(0.9)), ("Nesterov", nesterov)):
        K = gram("top")
        modes = reduced_modes(K)
        work = lambda modes=modes, rule=rule: mean_square_lr(modes, batch_size=BATCH, rule=rule)  # noqa: E731
        cost = ratio(work, lambda K=K: torch.linalg.eigh(K), repetitions)
        print(f"{SAMPLES} samples, {name}: the mean-square rate costs {cost:.0f} times one eigh")


def curve_costs(double: Modes, rule: UpdateRule, repetitions: int) -> str:
    single = replace(double, factor=double.factor.float(), curvatures=double.curvatures.float())
    lrs = 0.5 * torch.logspace(-1, 1, 32, dtype=torch.float64)

    def curve(modes: Modes, lrs: float | torch.Tensor) -> object:
        return sgd_exponent(modes, lrs, batch_size=BATCH, rule=rule, chains=CHAINS, steps=50, burn_in=0)

    wide, low = (ratio(lambda m=m: curve(m, lrs), lambda m=m: curve(m, 0.5), repetitions) for m in (double, single))
    return f"32 rates cost {wide:.1f} times one in float64, {low:.1f} in float32"


if __name__ == "__main__":
    main()
