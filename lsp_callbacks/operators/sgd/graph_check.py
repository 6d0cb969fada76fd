"""Whether rows that were read from a step's own graph are those of its replay."""

from __future__ import annotations

import torch

from lsp_callbacks.operators.sgd.gram_matrix import Check
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.output_directions import OutputDirections
from lsp_callbacks.operators.sgd.step_samples import replayed_evaluation
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot


def unexplained_rows(snapshot: Snapshot, rows: GraphRows) -> list[str]:
    """Return the parameters whose share of the Gram matrix is not that of a plain backward pass of the replayed step.

    ``c^T K c = ||J^T c||^2`` for random c, parameter by parameter. The whole step is replayed, in training mode and
    with its own random numbers, so that its dropout has the same masks.

    Args:
        snapshot: a step of one micro-batch.
        rows: that were read from its graph, formed with the shares without D.

    Raises:
        Unsupported: where outputs and targets cannot be told apart in the replay, or it has other samples.

    Cost: a gradient.
    """
    (chosen,) = rows.chosen
    n, parameters = len(chosen.positions), snapshot.parameters
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        evaluation = replayed_evaluation(snapshot, n)
    probes = ProbeSet(snapshot.module, (lambda: evaluation,), n, n)
    generator = torch.Generator().manual_seed(snapshot.generator("check of the rows").initial_seed())
    directions = OutputDirections(probes, {}, "top", chosen.positions.shape[1], generator, given={0: chosen})
    seeds = directions.choose(evaluation, 0)
    check = Check(parameters, {name: p.new_ones(()) for name, p in parameters.items()}, generator)
    check.add(evaluation.outputs, seeds, chosen.taken)
    return check.unexplained(rows.plain, None)
