"""Claim: the samples of a batch that have rows, taken by size, read as all of its samples do.

Every `EVERY` steps of runs of `STEPS` with a batch of 128: the Courant number of the second moment from all samples of
the step's batch, and from 64, 32 and 16 of them, taken by the size of their output Hessian (`sampled_rows`). Ratios to
all 128 are printed by their quartiles, with the ratio of the means and how often the two stand on different sides of 1;
below 1 is the falsely calm side.

    MNIST=folder python benchmarks/few_rows_are_enough.py [--seeds 1] [name of a run ...]

``few_rows_are_enough.md`` has the table of seed 1.
"""

import argparse
import warnings
from functools import partial
from statistics import mean, quantiles

import torch
from mean_square_agrees import images, network, taken
from runs import PROBLEMS, digits, mnist

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.sgd.frozen_sgd import frozen_sgd
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.probes import Probes

EVERY, STEPS, BATCH = 25, 1500, 128
ROWS = (64, 32, 16)
NAMES = (
    "ramp, SGD, ReLU MLP, digits", "constant, SGD, tanh MLP, digits", "ramp, momentum, ReLU MLP, digits",
    "constant, momentum, ReLU MLP", "constant, AdamW, ReLU MLP", "ramp, AdamW, ReLU MLP", "constant, AdamW, ReLU CNN",
)  # fmt: skip


def readings(name: str, seed: int) -> list[list[float]]:
    """Return the Courant numbers from all samples, and from fewer, of each reading."""
    torch.manual_seed(seed)
    chosen = PROBLEMS[name]
    net, (x, y) = network(chosen), (digits() if chosen.data == "digits" else mnist()).tensors
    if chosen.momentum is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), chosen.lr)
    else:
        optimizer = torch.optim.SGD(net.parameters(), chosen.lr, chosen.momentum)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: chosen.schedule(step / STEPS))
    batches, numbers = taken(x, y, BATCH), []
    probes = Probes(BATCH, None, None)
    probes.drop(len(x))
    net.train()
    for step in range(STEPS):
        batch, pending = next(batches), None
        probes.add(batch)
        if step % EVERY == 0 and step > 0:
            pending = PendingStep(net)
            pending.add(batch, images)
        loss = images(net, batch)
        optimizer.zero_grad()
        loss.backward()
        if not bool(loss.isfinite()):
            break
        if pending is not None:
            own = partial(probes.samples_of_step, pending, images)
            snapshot = pending.snapshot(step, optimizer, loss=loss.detach().clone(), samples_of_step=own)
            try:
                numbers.append([])
                for rows in (BATCH, *ROWS):
                    sgd = frozen_sgd(snapshot, own(lambda size: size), most=rows, squares="batch")
                    numbers[-1].append(sgd.lr / sgd.mean_square_lr(tol=2e-3))
            except Unmeasurable as error:
                print(f"  step {step}: {error}")
                numbers.pop()
        optimizer.step()
        scheduler.step()
    return numbers


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("names", nargs="*", default=NAMES)
    given = parser.parse_args()
    print(f"| run | readings | {' | '.join(f'{rows} / {BATCH}' for rows in ROWS)} |\n|---|---|{'---|' * len(ROWS)}")
    for name in given.names:
        numbers = [row for seed in given.seeds for row in readings(name, seed)]
        everything, *fewer = zip(*numbers)
        cells = []
        for some in fewer:
            low, middle, high = quantiles([a / b for a, b in zip(some, everything) if b > 0], n=4)
            sides = sum((a > 1) != (b > 1) for a, b in zip(some, everything))
            cells.append(f"{low:.2f}, {middle:.2f}, {high:.2f}; {mean(some) / mean(everything):.2f}; {sides}")
        print(f"| {name} | {len(numbers)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
