"""What a reading of the second moment costs, from the step's own graph or from a replay."""

from __future__ import annotations

from lsp_callbacks.operators.cost import beside, forward_cost, work
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.held_statistics import can_be_held
from lsp_callbacks.operators.sgd.statistics_factors import RENEWED
from lsp_callbacks.quantities.sgd.probe_cost import gram_cost, probe_share
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: In every so many readings two positions of each sample are compared, to see how alike they are.
COMPARED = 8
#: Operations on small tensors, beside those of each layer.
GRAPH_CALLS = 60
#: Nanoseconds of the critical rate from 64 rows.
RATE = 6e5


def graph_price(snapshot: Snapshot, rows: GraphRows) -> dict[str, float]:
    """Return the gradients of the readings that follow, by what they are spent on.

    Args:
        snapshot: a step.
        rows: that were read from its graph.
    """
    positions = 1 if rows.chosen[0].positions.shape[1] == 1 else 1 + 1 / COMPARED
    count = round(sum(len(chosen.taken) for chosen in rows.chosen) * positions)
    through = count if rows.kind is not None and rows.kind.by_rows else rows.samples  # gradients that are taken back
    gram = gram_cost(snapshot, count, rows.batch, calls=GRAPH_CALLS)
    parts = {"rows of the graph": positions / 3 * through / rows.batch + gram, **rate_cost(snapshot, count)}
    if rows.ties:  # now and then a backward pass through them
        parts["batch statistics"] = 2 / 3 / RENEWED
    return parts


def replay_price(
    snapshot: Snapshot, samples: ProbeSet, count: int, positions: int, *, is_first: bool, checks: bool
) -> dict[str, float]:
    """Return the gradients of a reading that replays its samples, by what they are spent on.

    Args:
        snapshot: a step.
        samples: of its batch.
        count: how many of them have rows.
        positions: of each of these that are looked at, where it has several.
        is_first: whether it is not known yet if it has.
        checks: whether the reading is checked.
    """
    n, once = samples.samples, work(snapshot)
    share = probe_share(snapshot, samples, n)
    if is_first and once.multiplications * share <= 1.5 * n * once.parameters:
        positions = 1
    rows = count * positions
    gram = gram_cost(snapshot, rows, n / max(share, 1e-9))
    parts = {"rows of the batch": (1 + positions) / 3 * share + gram, **rate_cost(snapshot, rows)}
    if samples.batches and can_be_held(samples.module):
        parts["batch statistics"] = (1 / 3 + 1 / RENEWED) * share
    elif samples.batches:
        parts["batch statistics"] = 2 / 3 * rows * share
    if checks:
        parts |= {"forward": forward_cost(snapshot), "gradient": 4 / 3, "check of the rows": 2 / 3 * share}
        parts["rows of the graph"] = 2 / 3 + gram  # which it is to learn, by passes for one sample and for all
    return parts


def rate_cost(snapshot: Snapshot, rows: int) -> dict[str, float]:
    """Return the gradients that the critical rate takes, from a Gram matrix of so many rows."""
    return {"critical rate": beside(snapshot, calls=30, time=RATE * (rows / 64) ** 3)}
