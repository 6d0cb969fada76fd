"""The samples at which a step's own batch is looked at."""

from __future__ import annotations

import torch

from lsp_callbacks.step.criterion import Criteria, Evaluation
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Rows of a Gram matrix at least, where there are that many to be had, and at most, where nothing else is said.
LEAST, MOST = 32, 128


def row_count(samples: int, wanted: int | None = None) -> int:
    """Return how many samples have rows: what is wanted, or a quarter of them, 32 at least and 128 at most.

    Taken by size they read as all of them do, and rather high than low, see ``benchmarks/few_rows_are_enough.py``.
    """
    return min(samples, wanted or min(max(LEAST, -(-samples // 4)), MOST))


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
    return criteria.of(loss, samples=samples)
