"""The pieces of a step's batch over which exact products are summed where the graph of the whole would not fit."""

from __future__ import annotations

import math

import torch

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.footprint import TWICE, footprint, readable
from lsp_callbacks.step.replay import DividedReplay, Replay
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: Part of the room beside training that a graph may take; vectors and copies take the rest.
GRAPH = 0.5


@computed_once
def pieces_of(snapshot: Snapshot) -> list[Replay]:
    """Return replays of pieces of the batch whose sum is the loss of the step, as many as its `room` asks for.

    Of a mean over samples the Hessian is the same sum, exactly. It is not where statistics of the batch tie samples
    together, where masks are drawn at random, or where the loss is normalised by more than the number of samples: then
    the pieces' losses do not add up to that of the step, and there are none.

    Returns:
        The replays; empty where the graph of the whole fits, with several ranks, in a game, and where there are none.

    Cost: one forward pass where the whole does not fit.
    """
    room, replay = snapshot.room().wanted, snapshot.replay
    if not isinstance(replay, DividedReplay) or room == math.inf or snapshot.player is not None:
        return []
    if snapshot.loss is None or snapshot.gradient is None:
        return []
    count = math.ceil(TWICE * footprint(snapshot).activations / (GRAPH * room))
    pieces = replay.pieces(count) if count > 1 else []
    if not pieces:
        return []
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        total = sum(float(piece().detach()) for piece in pieces)
    loss = float(snapshot.loss)
    return pieces if abs(total - loss) <= path_tolerance(snapshot.graph.dtype) * abs(loss) else []


def graph_memory(snapshot: Snapshot) -> float:
    """Return the bytes of the graph of exact products, whole or of one piece of the batch at a time."""
    whole = TWICE * footprint(snapshot).activations
    return whole / max(1, len(pieces_of(snapshot)))


def require_room(snapshot: Snapshot) -> None:
    """Refuse exact products that would replace differences, where their graph would not fit.

    Raises:
        Unmeasurable: above the step's `room`. Differences may do at another step.
    """
    room = snapshot.room().most
    needed = graph_memory(snapshot) if room < math.inf else 0.0
    if needed > room:
        raise Unmeasurable(
            f"differences of gradients are lost in rounding at this step, and exact products would take "
            f"{readable(needed)} beside training, more than {readable(room)}: allow more with max_memory=..., or "
            "measure part of the batch with sub_batch=..."
        )


def path_tolerance(dtype: torch.dtype) -> float:
    """Return how far losses may differ that are computed on other paths than the step's: by rounding alone."""
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
