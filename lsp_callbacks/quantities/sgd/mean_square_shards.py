"""The second moment of SGD with shards of the parameters: what a reading is made from, and costs."""

from __future__ import annotations

from lsp_callbacks.autograd._torch_internals import gathered_parameters
from lsp_callbacks.autograd.spread_tensors import sharded_modules
from lsp_callbacks.operators.cost import forward_cost
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD, frozen_sgd
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.recent_rows import SIZE
from lsp_callbacks.operators.sgd.shard_rows import read_rows, unexplained_shares
from lsp_callbacks.operators.sgd.step_samples import row_count, step_samples
from lsp_callbacks.operators.trajectory.coming_preconditioner import remembered_rule
from lsp_callbacks.operators.trajectory.spread_step import spread_step
from lsp_callbacks.quantities.sgd.graph_checks import ChecksGraphs
from lsp_callbacks.quantities.sgd.mean_square_cost import GRAPH_CALLS, rate_cost
from lsp_callbacks.quantities.sgd.probe_cost import gram_cost
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.replay_checks import verify, verify_gradient
from lsp_callbacks.step.sharded_replay import ShardedReplay
from lsp_callbacks.step.snapshot import Snapshot


class OfShards(ChecksGraphs):
    """A quantity of the linearised step that reads the shards where there are any, and whole weights where it cannot.

    Attributes:
        rows: how many rows are wanted; None is a quarter of the batch.
        outputs: which outputs they stand for, see `MeanSquareStability`.
    """

    rows: int | None
    outputs: str

    def __init__(self) -> None:
        super().__init__()
        self._gathers = False
        self._population: int | None = None

    def reads_shards(self, snapshot: Snapshot) -> bool:
        """Return whether a step has shards of which the rows can be read, as far as that is known."""
        is_spread = snapshot.run.shards is not None and snapshot.held is not None
        return is_spread and self.outputs == "top" and not self._gathers

    def view(self, snapshot: Snapshot) -> Snapshot:
        """Return the step itself where its rows are read from the shards; otherwise as it is elsewhere."""
        return snapshot if self.reads_shards(snapshot) else super().view(snapshot)

    def _of_shards(self, snapshot: Snapshot, rows: GraphRows, *, checks: bool) -> FrozenSGD | None:
        """Return the linearised step without a copy of the whole weights; None, on all ranks, where there is none."""
        measured = sgd_of_shards(snapshot, rows, self._population, checks=checks)
        if measured is None:
            self._gathers = checks  # from now on; other graphs than before are looked at once more
            if not checks:
                self._is_changed()
            return None
        if checks:
            self._is_checked()
            self._known, self._population = rows.kind, measured[1]
        return measured[0]


def sgd_of_shards(
    snapshot: Snapshot, rows: GraphRows, population: int | None, *, checks: bool
) -> tuple[FrozenSGD, int | None] | None:
    """Return the linearised step of all processes, from a replay of the sharded module, and the population.

    Args:
        snapshot: a step with shards; all processes come here together.
        rows: that have read nothing.
        population: as it was last; None where this is a check.
        checks: whether the rows are compared with a plain backward pass.

    Returns:
        None where the graph of the step cannot be read, or its rows are others than those of the step: on all processes
        alike.

    Raises:
        Unmeasurable: where a replay is not the step.
    """
    ranks, replay = snapshot.run.ranks, snapshot.replay
    if not isinstance(replay, ShardedReplay):
        return None
    if checks:
        verify_gradient(snapshot)
        if snapshot.loss is not None:
            verify(snapshot)
    try:
        plain = read_rows(snapshot, rows, remembered_rule, plain=checks)
        wrong = unexplained_shares(snapshot, rows, plain) if checks else []
    except Exception:  # whatever the rules of layers raise, on all processes: the whole weights are looked at
        return None
    if wrong or ranks.any(lambda: rows.alike, "outputs that are alike"):
        return None
    if checks:
        of_step = lambda: replay.before_step(lambda: step_samples(snapshot).population)  # noqa: E731
        population = ranks.first(of_step, "the population")
    samples = ProbeSet(snapshot.module, (), rows.samples, rows.batch, population)
    return frozen_sgd(spread_step(snapshot), samples, squares="batch", rows=rows), population


def shards_price(snapshot: Snapshot, wanted: int | None, *, checks: bool) -> dict[str, float]:
    """Return the gradients of a reading, by what they are spent on.

    Args:
        snapshot: a step with shards.
        wanted: how many rows; None is a quarter of the batch.
        checks: whether the reading is checked.
    """
    size, world = _samples(snapshot), snapshot.run.ranks.world
    count = row_count(size * world, wanted)
    parts = {
        "replay of the shards": 1 / 3,
        "rows of the graph": 1 / 3 + gram_cost(snapshot, count, size, calls=GRAPH_CALLS),
        **rate_cost(snapshot, count),
    }
    if checks:
        parts |= {"forward": forward_cost(snapshot), "gradient": 4 / 3, "check of the rows": 1.0}
    return parts


def shards_memory(snapshot: Snapshot, wanted: int | None) -> dict[str, float]:
    """Return the bytes beside training, by what they are for; see `shards_price`."""
    count, training = row_count(_samples(snapshot) * snapshot.run.ranks.world, wanted), footprint(snapshot)
    units = (
        sum(whole.numel() * whole.element_size() for _, whole in gathered_parameters(child))
        for child in sharded_modules(snapshot.module)
    )
    return {
        "gradients": 2 * training.parameters,
        "graph of a replay": 2 * training.activations,
        "weights of one module": 2.0 * max(units, default=0),
        "sketches": 4.0 * count * SIZE,
    }


def _samples(snapshot: Snapshot) -> int:
    return getattr(snapshot.replay, "samples", None) or 1
