"""What a reading of the second moment costs, from the step's own graph or from a replay."""

from __future__ import annotations

from lsp_callbacks.operators.cost import MULTIPLICATION, beside, forward_cost, gradient_time, work
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.held_statistics import can_be_held
from lsp_callbacks.operators.sgd.some_units import ONE_IN
from lsp_callbacks.operators.sgd.statistics_factors import RENEWED
from lsp_callbacks.operators.trajectory.coming_preconditioner import is_remembered
from lsp_callbacks.operators.trajectory.frozen_preconditioner import step_constants
from lsp_callbacks.quantities.sgd.probe_cost import gram_cost, probe_share
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: In every so many readings two positions of each sample are compared, to see how alike they are.
COMPARED = 8
#: Operations on small tensors, beside those of each layer.
GRAPH_CALLS = 60
#: Nanoseconds of the critical rate from 64 rows.
RATE = 6e5
#: Where samples have several positions inside of the network: nanoseconds of each of the forward pass's operations,
#: once in the pass back and once in the products, and of each number in its results, in the pass back.
NODE, PASSED = 1.1e5, 0.85
#: Nanoseconds of each number of the rows where they are formed: as sketches, otherwise, and where some units stand for
#: all.
SKETCHED, FORMED, SOME_FORMED = 2.5, 1.0, 0.4
#: Share of the positions at which the gradients at layers are not zero, as they look back alone.
REACHED = 2 / 3
#: By how much `gradient_time` is above what ``benchmarks/costs_are_counted.py`` counts in a gradient of a transformer.
LONGER = 1.28


def graph_price(snapshot: Snapshot, rows: GraphRows) -> dict[str, float]:
    """Return the gradients of the readings that follow, by what they are spent on, but for the preconditioner.

    Args:
        snapshot: a step.
        rows: that were read from its graph.
    """
    positions = 1 if rows.chosen[0].positions.shape[1] == 1 else 1 + 1 / COMPARED
    taken = sum(len(chosen.taken) for chosen in rows.chosen)
    count = round(taken * positions)
    if has_positions(rows):
        each, part = (SKETCHED, 1.0) if rows.recent is not None else (SOME_FORMED, 1 / ONE_IN)
        spent = positions * (_pass_time(snapshot, rows) + _form_time(snapshot, rows, taken, each, part))
        graph = LONGER * spent / gradient_time(snapshot)
    else:
        through = count if rows.kind is not None and rows.kind.by_rows else positions * rows.samples  # gradients
        graph = through / (3 * rows.batch) + gram_cost(snapshot, count, rows.batch, calls=GRAPH_CALLS)
    parts = {"rows of the graph": graph, **rate_cost(snapshot, count)}
    if rows.ties:  # now and then a backward pass through them
        parts["batch statistics"] = 2 / 3 / RENEWED
    return parts


def has_positions(rows: GraphRows) -> bool:
    """Return whether layers are called with several positions of each sample."""
    return rows.kind is not None and max(rows.kind.lengths[:-1], default=1) > 1


def checked_price(snapshot: Snapshot, rows: GraphRows | None) -> dict[str, float]:
    """Return the gradients of a reading whose rows, from the graph, are compared with a replay, by purpose.

    Args:
        snapshot: a step.
        rows: that were read from its graph; nothing is returned where none were, or statistics of the batch tie the
            samples together, or layers are called with one position of each sample.
    """
    if rows is None or rows.ties or not has_positions(rows):
        return {}
    positions, taken = rows.chosen[0].positions.shape[1], sum(len(chosen.taken) for chosen in rows.chosen)
    # A pass finds out where the samples are; what is compared is formed without the preconditioner.
    spent = (1 + positions) * _pass_time(snapshot, rows)
    for each in (FORMED, SKETCHED if rows.recent is not None else FORMED):
        each *= (1 + positions) / 2  # blocks of more rows have fewer numbers of each
        spent += _form_time(snapshot, rows, positions * taken, each, 1.0)
    return {
        "rows of the graph": LONGER * spent / gradient_time(snapshot),
        "forward": forward_cost(snapshot), "gradient": 4 / 3, "check of the rows": 1.0,
        **rate_cost(snapshot, positions * taken),
    }  # fmt: skip


def _pass_time(snapshot: Snapshot, rows: GraphRows) -> float:
    """Return the nanoseconds of a pass back to the layers, for all samples."""
    once, share = work(snapshot), rows.samples / rows.batch
    return NODE * once.calls + share * (MULTIPLICATION * once.multiplications + PASSED * once.elements)


def _form_time(snapshot: Snapshot, rows: GraphRows, count: int, each: float, part: float) -> float:
    """Return the nanoseconds in which so many rows are formed, and their products, from a part of their numbers."""
    once = work(snapshot)
    numbers = float(count * once.parameters)
    products = REACHED * count / rows.batch * once.multiplications + count * numbers
    return NODE * once.calls + part * MULTIPLICATION * products + each * numbers


def rule_cost(snapshot: Snapshot) -> dict[str, float]:
    """Return the gradients that the preconditioner takes, by purpose: twice as many while it holds few gradients."""
    if not step_constants(snapshot).frozen:
        return {}
    times = 1 if is_remembered(snapshot) else 2
    calls = 10.0 * len(snapshot.parameters)
    return {"preconditioner": LONGER * times * beside(snapshot, calls=calls, vectors=2.8)}


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
        if "batch statistics" in parts:  # a combination of the rows is taken back through them, in the graph, too
            parts["batch statistics"] += (1 - 1 / RENEWED) * share + 2 / 3
    return parts


def rate_cost(snapshot: Snapshot, rows: int) -> dict[str, float]:
    """Return the gradients that the critical rate takes, from a Gram matrix of so many rows."""
    return {"critical rate": beside(snapshot, calls=30, time=RATE * (rows / 64) ** 3)}
