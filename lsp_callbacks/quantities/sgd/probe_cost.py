"""What the Gram matrix of the probes costs: passes over them, and bytes beside training."""

from __future__ import annotations

from lsp_callbacks.operators.cost import MULTIPLICATION, beside, forward_cost, sample_passes, work
from lsp_callbacks.operators.memory import footprint, unfolded
from lsp_callbacks.operators.sgd.gram_matrix import HELD, TangentKernel
from lsp_callbacks.operators.trajectory.coming_preconditioner import DRAWS
from lsp_callbacks.operators.trajectory.frozen_preconditioner import frozen_rule
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Nanoseconds of the random products of one measurement, on 128 rows.
NUMERICS = 5e7
#: Memory that recording takes, in activations, and random products, in matrices of the size of the Gram matrix:
#: measured in ``benchmarks/memory_is_predicted.py``.
RECORDED, PRODUCTS = 1.7, 40


def probe_share(snapshot: Snapshot, probes: ProbeSet, samples: int) -> float:
    """Return how many batches of one rank the probes are: each rank processes all probes, but a part of the batch."""
    return samples * snapshot.run.ranks.world / max(probes.batch_size, 1)


def kernel_cost(
    snapshot: Snapshot, probes: ProbeSet, samples: int, kernel: TangentKernel | None, *, checks: bool = True
) -> dict[str, float]:
    """Return the gradients of one step that a measurement of the Gram matrix costs, by what they are spent on.

    Args:
        snapshot: a step.
        probes: of the step.
        samples: number of probes.
        kernel: the last one measured, which shows how many rows a sample has and how they had to be computed.
        checks: whether replay, gradient and shares are checked.
    """
    share = probe_share(snapshot, probes, samples)
    rows, passes = (1, 0.0) if kernel is None else (kernel.rows, float(kernel.passes))
    alone = samples * rows if kernel is not None and "layer" in kernel.path.values() else 0.0
    gram = sample_passes(snapshot, 1, alone) + gram_cost(snapshot, samples * rows)
    if probes.batches:  # a pass over the sample's batch for each row
        passes = rows * probes.together * len(probes.batches) * probes.together / max(probes.samples, 1)
    device = next(iter(snapshot.parameters.values())).device
    numerics = beside(snapshot, time=NUMERICS * (samples * rows / 128) ** 2)
    parts = {
        "kernel": (1 + rows + passes * 2) / 3 * share + gram,
        "products": max(numerics, 0.0 if device.type == "cpu" else 2.0),
    }
    if checks:
        parts |= {"forward": forward_cost(snapshot), "gradient": 1.0, "check of the kernel": 2 / 3 * share}
    if frozen_rule(snapshot).frozen:
        parts["signs of the probes"] = (3 + 2 * DRAWS) / 3 * share
    return parts


def gram_cost(snapshot: Snapshot, rows: int) -> float:
    """Return the gradients that a Gram matrix of so many rows takes beside the passes."""
    once = work(snapshot)
    weighted = frozen_rule(snapshot).frozen
    dense = MULTIPLICATION * rows * once.parameters * (2 if weighted else 0.5)
    return beside(snapshot, calls=60 + 3 * once.calls, time=dense)


def kernel_memory(snapshot: Snapshot, probes: ProbeSet, samples: int, rows: int) -> dict[str, float]:
    """Return the bytes of activations and per-layer gradients of the probes, and of products with their Gram matrix.

    Args:
        snapshot: a step.
        probes: of the step.
        samples: number of probes.
        rows: of the Gram matrix.
    """
    training = footprint(snapshot)
    products = {
        "gradients": 3 * training.parameters,
        "products": PRODUCTS * 8 * rows**2,
        "copies": 2 * training.buffers,
    }
    if probes.batches:  # one batch at a time, and the rows of all
        at_once = probes.together / max(probes.batch_size, 1)
        stored = min(rows * training.parameters, 4.0 * HELD)
        return {"activations of the probes": at_once * training.activations, "rows": 2 * stored} | products
    return products | {
        "activations of the probes": RECORDED * probe_share(snapshot, probes, samples) * training.activations,
        "patches of a convolution": 2 * unfolded(snapshot, samples),
    }
