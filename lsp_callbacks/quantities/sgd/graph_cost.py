"""What rows of the Gram matrix cost that are read from a step's own graph, and the critical rate from them."""

from __future__ import annotations

from lsp_callbacks.operators.cost import beside, work
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.trajectory.coming_preconditioner import remembered_rule
from lsp_callbacks.quantities.sgd.probe_cost import gram_cost
from lsp_callbacks.step.snapshot import Snapshot

#: Operations on small tensors, beside those of each layer, and those of the critical rate.
CALLS, RATE_CALLS = 180, 100
#: Nanoseconds of each number of a row that is kept in a sketch, and of the critical rate from 64 rows.
SKETCH, RATE = 3.5, 6e5


def graph_cost(snapshot: Snapshot, rows: GraphRows, *, corrected: int) -> dict[str, float]:
    """Return the gradients of a reading whose rows come from the step's own graph, by what they are spent on.

    Args:
        snapshot: a step.
        rows: that were read from its graph.
        corrected: under statistics of the batch, in every so many readings the largest eigenvalue is corrected anew.
    """
    positions = 1 if rows.recent is not None else rows.chosen[0].positions.shape[1]
    count = sum(len(chosen.taken) for chosen in rows.chosen) * positions
    through = count if rows.kind is not None and rows.kind.by_rows else rows.samples  # gradients that are taken back
    gram = gram_cost(snapshot, count, rows.batch, calls=CALLS)
    if rows.recent is not None:
        gram += beside(snapshot, time=SKETCH * count * work(snapshot).parameters)
    parts = {"rows of the graph": positions / 3 * through / rows.batch + gram, **rate_cost(snapshot, count)}
    if rows.ties:  # a backward pass, and products once more where D has moved since
        again = gram / 2 if remembered_rule(snapshot).frozen else 0.0
        parts["batch statistics"] = (2 / 3 + again) / corrected
    return parts


def rate_cost(snapshot: Snapshot, rows: int) -> dict[str, float]:
    """Return the gradients that the critical rate from so many rows costs."""
    return {"critical rate": beside(snapshot, calls=RATE_CALLS, time=RATE * (rows / 64) ** 3)}
