"""What the Gram matrix of the probes costs: passes over them, and bytes beside training."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lsp_callbacks.operators.cost import ELEMENT, MULTIPLICATION, beside, forward_cost, work
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.memory import unfolded
from lsp_callbacks.operators.sgd.gram_matrix import HELD, TangentKernel
from lsp_callbacks.operators.sgd.layer_alone import HELD_ALONE
from lsp_callbacks.operators.sgd.layer_rules import has_few_channels
from lsp_callbacks.operators.sgd.per_sample_gradients import has_rule
from lsp_callbacks.operators.trajectory.coming_preconditioner import DRAWS
from lsp_callbacks.operators.trajectory.frozen_preconditioner import step_constants
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Nanoseconds of the random products of one measurement, on 128 rows.
NUMERICS = 5e7
#: Operations on small tensors beside those of each layer.
CALLS = 300
#: Memory that recording takes, in activations, and random products, in matrices of the size of the Gram matrix:
#: measured in ``benchmarks/memory_is_predicted.py``.
RECORDED, PRODUCTS = 1.7, 40
#: How much longer a forward and a backward pass of one sample take than its share of a batch.
ALONE = 3.0


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
    path = None if kernel is None else kernel.path
    gram = gram_cost(snapshot, samples * rows, samples / max(share, 1e-9), path=path)
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
    if step_constants(snapshot).frozen:
        parts["signs of the probes"] = (3 + 2 * DRAWS) / 3 * share
    return parts


def gram_cost(
    snapshot: Snapshot, rows: int, batch: float, *, calls: float = CALLS, path: Mapping[str, str] | None = None
) -> float:
    """Return the gradients that a Gram matrix of so many rows takes beside the passes.

    Rows of layers that act at one position are never formed; others are, as gradients of their weights, and then
    multiplied for each pair. Behind a preconditioner some weights of a large layer are looked at.

    Args:
        snapshot: a step.
        rows: how many.
        batch: how many samples a gradient of this rank has.
        calls: operations on small tensors, beside those of each layer.
        path: by which rules an earlier matrix was computed, see `TangentKernel`; None asks the layers.
    """
    once, frozen = work(snapshot), step_constants(snapshot).frozen
    numbers = float(rows * once.parameters)
    time, formed = 0.0, 0.0
    if once.multiplications > 1.5 * batch * once.parameters:  # several positions
        formed = rows / (3 * batch)
        time += (MULTIPLICATION * rows + 0.5 + frozen) * numbers + ELEMENT * _windows(snapshot, rows)
    elif frozen:
        time += MULTIPLICATION * numbers + 19.0 * once.parameters
    return (
        formed + _alone_cost(snapshot, rows, batch, path) + beside(snapshot, calls=calls + 12 * once.calls, time=time)
    )


def _alone_cost(snapshot: Snapshot, rows: int, batch: float, path: Mapping[str, str] | None) -> float:
    """Return the gradients that layers take which are run again on one sample at a time: those without a rule."""
    modules, total = dict(snapshot.module.named_modules()), work(snapshot).parameters
    spent = 0.0
    for name in snapshot.calls:
        layer = modules[name]
        sizes_by_name = {f"{name}.{key}".lstrip("."): p.numel() for key, p in layer.named_parameters(recurse=False)}
        if path is not None:
            sizes = [size for key, size in sizes_by_name.items() if path.get(key) == "layer"]
        else:
            has_none = not has_rule(layer) and not isinstance(layer, nn.MultiheadAttention)
            sizes = [size for key, size in sizes_by_name.items() if key in snapshot.parameters and has_none]
        runs = 1 if rows * sum(sizes) <= HELD_ALONE else len(sizes)
        spent += runs * ALONE * rows / batch * sum(sizes) / total
    return spent


def _windows(snapshot: Snapshot, samples: int) -> float:
    """Return how many numbers the inputs of convolutions have as matrices of patches, where those are formed."""
    modules, numbers = dict(snapshot.module.named_modules()), 0.0
    for name, call in snapshot.calls.items():
        layer = modules[name]
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and call.output_shape is not None:
            positions = math.prod(call.output_shape[2:])
            if not (layer.weight.is_cpu and has_few_channels(layer, positions)):
                numbers += samples * layer.weight[0].numel() * layer.groups * positions
    return numbers


def _outputs(snapshot: Snapshot) -> float:
    """Return the bytes of what layers return for the step's batch: each row of a sample has their gradients."""
    modules, numbers = dict(snapshot.module.named_modules()), 0
    for name, call in snapshot.calls.items():
        if call.output_shape is not None and any(True for _ in modules[name].parameters(recurse=False)):
            numbers += math.prod(call.output_shape)
    return float(numbers * next(iter(snapshot.parameters.values())).element_size())


def kernel_memory(snapshot: Snapshot, probes: ProbeSet, samples: int, rows: int) -> dict[str, float]:
    """Return the bytes of activations and per-layer gradients of the probes, and of products with their Gram matrix.

    Args:
        snapshot: a step.
        probes: of the step.
        samples: number of probes.
        rows: of the Gram matrix.
    """
    training, share = footprint(snapshot), probe_share(snapshot, probes, samples)
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
        "activations of the probes": RECORDED * share * training.activations,
        "further rows": (rows / samples - 1) * share * _outputs(snapshot),
        "patches of a convolution": 2 * unfolded(snapshot, samples),
    }
