"""The samples at which a step's own batch is looked at."""

from __future__ import annotations

import torch

from lsp_callbacks.step.criterion import Criteria, Evaluation
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Rows of a Gram matrix at least, where there are that many to be had, and at most, where nothing else is said.
LEAST, MOST = 32, 128


def row_count(batch: int, wanted: int | None = None) -> int:
    """Return how many samples of a batch are looked at: what is wanted, or half of it, 32 at least and 128 at most."""
    return min(batch, wanted or min(max(LEAST, -(-batch // 2)), MOST))


def step_samples(snapshot: Snapshot, wanted: int | None = None) -> ProbeSet:
    """Return the first samples of the step's own batch; the probes, or a replay, where a loop did not provide them.

    Args:
        snapshot: a step.
        wanted: how many; None see `row_count`.

    Raises:
        Unsupported: later, where outputs and targets cannot be told apart.
    """
    if snapshot.samples_of_step is not None:
        return snapshot.samples_of_step(lambda batch: row_count(batch, wanted))
    if snapshot.probes is not None:
        return snapshot.probes
    with torch.no_grad():
        samples = len(_replayed(snapshot).outputs)
    return ProbeSet(snapshot.module, (lambda: _replayed(snapshot),), samples, samples)


def _replayed(snapshot: Snapshot) -> Evaluation:
    with Criteria() as criteria, torch.enable_grad():
        loss = snapshot.replay()
    return criteria.of(loss, samples=None)
