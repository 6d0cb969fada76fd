"""The samples at which a step's own batch is looked at, and which of them have a row in its Gram matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lsp_callbacks.errors import Unsupported
from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.step.criterion import HOW, Criteria, Evaluation
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Rows of a Gram matrix at least, where there are that many to be had, and at most, where nothing else is said.
LEAST, MOST = 32, 128
#: What to do where the snapshot was made by hand, and no loop says what outputs and criterion are.
BY_HAND = (
    "give the snapshot probes=ProbeSet(module, (lambda: evaluation(outputs, criterion, samples=n),), n, n), with "
    "evaluation from lsp_callbacks.step.criterion"
)


def row_count(samples: int, wanted: int | None = None) -> int:
    """Return how many samples have rows: what is wanted, or a quarter of them, 32 at least and 128 at most.

    Taken by size they read as all of them do, and rather high than low, see ``benchmarks/few_rows_are_enough.py``.
    """
    return min(samples, wanted or min(max(LEAST, -(-samples // 4)), MOST))


def sampled_rows(sizes: Array, count: int, offset: float) -> tuple[Tensor, Tensor]:
    """Return the indices of ``count`` samples of N, and the probabilities by which they were taken.

    A sample is taken with a probability in proportion to its size, at most 1: where few samples of a batch are still
    uncertain they have all that there is of curvature, and none of them is missed. A sample that is taken stands for
    one over its probability.

    Args:
        sizes: ``(N,)``, not negative.
        count: how many to take.
        offset: in [0, 1), by chance; the samples are taken at equal distances in the sum of the probabilities.
    """
    n = len(sizes)
    if count >= n:
        return torch.arange(n), torch.ones(n, dtype=torch.float64)
    size = sizes.astype(float)
    largest = float(size.max())
    size = np.maximum(size / largest, 1e-9) if largest > 0 else np.ones(n)
    rising = np.sort(size)
    rest = rising.cumsum()  # of each one, and of those that are smaller
    is_sure = np.arange(count - n + 1, count + 1) * rising > rest  # those leave less to share for the others
    sure = n - 1 - int(is_sure[::-1].argmin())
    chance = np.minimum(size * ((count - n + 1 + sure) / rest[sure]), 1.0)
    last = np.minimum(
        np.ceil(chance.cumsum() - offset), count
    )  # of the places that lie in the part of each sample, or before it
    before = np.empty(n)
    before[0], before[1:] = 0, last[:-1]
    taken = (last > before).nonzero()[0]
    return torch.from_numpy(taken), torch.from_numpy(chance[taken])


def random_fraction(seed: int) -> float:
    """Return a number in [0, 1) that looks random, by the mixing of SplitMix64 (Steele, Lea & Flood 2014)."""
    value = ((seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) % 2**64
    return ((value ^ (value >> 31)) >> 11) / 2**53


def step_samples(snapshot: Snapshot, most: int | None = None) -> ProbeSet:
    """Return the samples of the step's own batch; the probes, or a replay, where a loop did not provide them.

    Args:
        snapshot: a step.
        most: how many at most; None is the whole batch.

    Raises:
        Unsupported: later, where outputs and targets cannot be told apart.
    """
    if snapshot.samples_of_step is not None:
        return snapshot.samples_of_step(lambda batch: batch if most is None else min(batch, most))
    if snapshot.probes is not None:
        return snapshot.probes
    with torch.no_grad():
        samples = len(replayed_evaluation(snapshot).outputs)
    return ProbeSet(snapshot.module, (lambda: replayed_evaluation(snapshot),), samples, samples)


def replayed_evaluation(snapshot: Snapshot, samples: int | None = None) -> Evaluation:
    """Return outputs and criterion of the whole step, replayed in training mode.

    Raises:
        Unsupported: where outputs and targets cannot be told apart.
    """
    with Criteria() as criteria, torch.enable_grad():
        loss = snapshot.replay()
    try:
        return criteria.of(loss, samples=samples)
    except Unsupported as error:
        if snapshot.samples_of_step is not None:  # of a loop, which takes these arguments
            raise
        raise Unsupported(str(error).replace(HOW, BY_HAND).replace("training_step", "replay")) from None
