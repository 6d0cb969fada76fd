"""Rows of the Gram matrix where each process holds a shard of the parameters, without a copy of the whole weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lsp_callbacks.autograd.gathered_weights import GatheredWeights
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.autograd.graph_pull import UnknownGraph
from lsp_callbacks.autograd.spread_tensors import local, spread_like, whole
from lsp_callbacks.operators.sgd.gram_matrix import tolerance
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.output_directions import OutputDirections
from lsp_callbacks.operators.sgd.per_sample_gradients import whole_seeds
from lsp_callbacks.operators.trajectory.frozen_preconditioner import FrozenRule
from lsp_callbacks.step.criterion import Criteria
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.sharded_replay import ShardedReplay
from lsp_callbacks.step.snapshot import Snapshot, computed_once

Scale = Mapping[str, "float | Tensor"]


@computed_once
def spread_step(snapshot: Snapshot) -> Snapshot:
    """Return a step with shards as its optimizer sees it: parameters and gradients as spread tensors.

    Clipping by norm is in the gradients already.

    Args:
        snapshot: any step; without shards it is returned itself.

    Raises:
        UnknownGraph: where numbers are clipped one by one.
    """
    if snapshot.held is None or snapshot.run.shards is None:
        return snapshot
    factor = clip_factor(snapshot)
    originals = dict(snapshot.module.named_parameters())
    gradient = None
    if snapshot.gradient is not None:
        gradient = {
            name: None if g is None else spread_like(g if factor == 1 else factor * g, originals[name])
            for name, g in snapshot.gradient.items()
        }
    return replace(snapshot, held=None, gradient=gradient, clipping=None)


@computed_once
def clip_factor(snapshot: Snapshot) -> float:
    """Return by what the step's gradient is multiplied before the optimizer sees it. Cost: an all-reduce if any."""
    if snapshot.clipping is None or snapshot.gradient is None or snapshot.run.shards is None:
        return 1.0
    if snapshot.clipping.kind == "value":
        raise UnknownGraph("numbers of the gradient are clipped one by one")
    squares = {name: g.double().square().sum() for name, g in snapshot.gradient.items() if g is not None}
    size = snapshot.run.shards.total(squares, "the norm of the gradient").sqrt()
    return float(snapshot.clipping.factor(size[None]))


class WholeScale(Mapping):
    """A diagonal D whose tensors are spread, each gathered when it is asked for, by all processes together.

    Args:
        rule: of the optimizer.
        factor: of all numbers.
    """

    def __init__(self, rule: FrozenRule, factor: float):
        self._scale, self._factor = rule.scale, factor

    def __getitem__(self, name: str) -> float | Tensor:
        value = self._scale[name]
        value = whole(value) if isinstance(value, Tensor) else value
        return value if self._factor == 1 else self._factor * value

    def __iter__(self) -> Iterator[str]:
        return iter(self._scale)

    def __len__(self) -> int:
        return len(self._scale)


def read_rows(
    snapshot: Snapshot, rows: GraphRows, rule: Callable[[Snapshot], FrozenRule], *, plain: bool
) -> dict[str, Tensor]:
    """Read rows from the graph of a replay with shards, join those of all processes, and form them.

    The weights are gathered module by module, and so is a preconditioner. Rows that are outer products are sent to all
    processes; of samples with several positions, and of other layers, sketches of them.

    Args:
        snapshot: a step with shards; all processes come here together.
        rows: that have read nothing.
        rule: of the optimizer, from the step as it sees it.
        plain: whether the shares of the first process alone, without D, are wanted.

    Returns:
        The shares, by parameter name; nothing where they are not wanted.

    Raises:
        Exception: on all processes, where the graph of one cannot be read, or anything else fails.

    Cost: a forward pass, and the pass back of the rows. Memory: the graph, and the weights of one module.
    """
    ranks, replay = snapshot.run.ranks, snapshot.replay
    if not isinstance(replay, ShardedReplay) or replay.samples is None:
        raise UnknownGraph("the step has several micro-batches, or no samples that could be counted")

    def take(loss: Tensor) -> None:
        rows.weights = GatheredWeights(snapshot.module)
        try:
            rows.saw_loss(loss, samples=replay.samples, factor=1.0, micro_batches=ranks.world)
        finally:
            rows.weights.release()
            rows.weights = None
        if rows.failure is not None:
            raise rows.failure

    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        replay.look(take)

    def form() -> dict[str, Tensor]:
        with ranks.checked():
            scale = WholeScale(rule(spread_step(snapshot)), clip_factor(snapshot))
            shares = rows.plain_shares() if plain else {}
            tensors = None if rows.recent is not None else rows.tensors()
            if ranks.any(lambda: tensors is None, "rows that are more than outer products"):
                rows.is_sketched = True
                rows.form(scale)
                sent = ranks.gather(lambda: (rows.sketch.cpu(), rows.looked), "sketches of the rows")
                rows.join_sketches([sketch for sketch, _ in sent], [looked for _, looked in sent])
            else:
                parts = ranks.gather(lambda: (tensors, rows.looked), "rows")
                rows.join([part for part, _ in parts if part is not None], [looked for _, looked in parts])
                rows.form(scale)
            return shares

    return ranks.apart(form)


def unexplained_shares(snapshot: Snapshot, rows: GraphRows, plain: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters whose share of the first process's rows is not that of a plain backward pass.

    As `lsp_callbacks.operators.sgd.graph_check.unexplained_rows`: ``c^T K c = ||J^T c||^2`` for random c, with the
    backward pass of the sharded module itself, in which the other processes have c = 0.

    Args:
        snapshot: a step with shards; all processes come here together.
        rows: that were read from its replay, and joined.
        plain: their shares.

    Cost: a gradient.
    """
    ranks, shards, replay = snapshot.run.ranks, snapshot.run.shards, snapshot.replay
    assert isinstance(replay, ShardedReplay) and shards is not None
    chosen = rows.chosen[ranks.rank]
    names = list(snapshot.parameters)

    def pulled() -> tuple[Tensor, dict[str, Tensor], torch.dtype]:
        def backward(loss: Tensor) -> tuple[Tensor, list[Tensor | None], torch.dtype]:
            evaluation = criteria.of(loss, samples=replay.samples)
            outputs, n = evaluation.outputs, len(evaluation.outputs)
            probes = ProbeSet(snapshot.module, (lambda: evaluation,), n, n)
            generator = torch.Generator().manual_seed(snapshot.generator("check of the rows").initial_seed())
            directions = OutputDirections(probes, {}, "top", chosen.positions.shape[1], generator, given={0: chosen})
            seeds = directions.choose(evaluation, 0)
            c = torch.randn(n, len(seeds), generator=generator).to(outputs)
            total = whole_seeds(seeds, c, outputs)
            gradients = replay.pulled(outputs, total * float(ranks.rank == 0))
            return c[chosen.taken].reshape(-1), gradients, read(outputs).dtype

        with Criteria() as criteria, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            c, gradients, dtype = replay.look(backward)
        # The gradients are means over the processes.
        squares = {
            name: torch.zeros((), dtype=torch.float64)
            if g is None
            else (ranks.world * local(g).double()).square().sum()
            for name, g in zip(names, gradients)
        }
        return c, squares, dtype

    c, squares, dtype = ranks.apart(pulled)

    def on_this_one() -> tuple[Tensor]:
        return (torch.stack([squares[name].cpu() / shards.copies[name] for name in names]).to(ranks.device),)

    (means,) = ranks.mean(on_this_one, "check of the rows")
    expected = dict(zip(names, (ranks.world * means).tolist()))

    def unexplained() -> list[str]:
        c_wide, least = c.double(), tolerance(dtype)
        rounding = least**2 * sum(expected.values())
        wrong = []
        for name, square in expected.items():
            share = plain.get(name)
            value = 0.0 if share is None else float(c_wide @ (share.double() @ c_wide))
            trace = 0.0 if share is None else float(share.trace())
            size = max(square, trace, rounding)
            if size and not abs(value - square) <= least * size:
                wrong.append(name)
        return wrong

    return ranks.first(unexplained, "check of the rows")
