"""How quantities of the Hessian look at a step of a module with shards."""

from __future__ import annotations

from lsp_callbacks.errors import Unsupported
from lsp_callbacks.operators.curvature.followed_top import FEW
from lsp_callbacks.operators.trajectory.spread_step import clip_factor
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.whole_copy import rounded_to


def whole_or_shards(snapshot: Snapshot, *, needs_whole: bool = False) -> Snapshot:
    """Return a step on whole parameters, or the shards themselves where there is no room for these.

    Args:
        snapshot: a step; without shards it is returned itself.
        needs_whole: whether what follows is not implemented on shards.

    Raises:
        Unsupported: where there is no room, and the products or the update of shards are not implemented: weights that
            are rounded before each pass, numbers of the gradient that are clipped one by one, and where there are so
            few parameters that they are measured to the end.
    """
    try:
        return snapshot.whole
    except Unsupported:
        is_clipped_one_by_one = snapshot.clipping is not None and snapshot.clipping.kind == "value"
        is_tiny = snapshot.size <= FEW
        if needs_whole or is_clipped_one_by_one or is_tiny or rounded_to(snapshot.module) is not None:
            raise
        clip_factor(snapshot)  # while all processes are here: later the first one asks for it alone
        return snapshot
