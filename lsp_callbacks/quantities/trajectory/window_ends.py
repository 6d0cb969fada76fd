"""Intervals of the norms of a window of steps, by products with all its steps in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.training_profile import FAILURE, NoiseSeen, Tangents
from lsp_callbacks.linalg import LinearOperator, top_between
from lsp_callbacks.linalg.logs import log
from lsp_callbacks.operators.trajectory.window import Window, squares
from lsp_callbacks.step.snapshot import Snapshot

#: Ratio of the ends of an interval at which no further product is made.
RATIO = 1.2


@dataclass(frozen=True)
class Ends:
    """Intervals of a window.

    Attributes:
        log_norms: logs of both ends of ``||A_T ... A_1||``, and of its product with each reader of the parameters.
        noise: of the noise.
    """

    log_norms: list[tuple[float, float]]
    noise: NoiseSeen


def window_ends(
    snapshot: Snapshot, window: Window, now: Tangents, readers: Sequence[LinearOperator], *, pairs: int
) -> Ends:
    """Return norms of a window, of its products with readers, and of its noise, by one block Lanczos of `squares`.

    Each upper end fails with probability `FAILURE` at most, that of the noise with half of it.

    Args:
        snapshot: of the step after the window.
        window: the steps.
        now: directions that were pushed through it.
        readers: operators on the parameters at its end.
        pairs: largest number of pairs of passes; fewer where the ends are within `RATIO` of each other.

    Raises:
        Unmeasurable: if the products are not finite, or too small for the type of the parameters.

    Cost: two passes through the window for each pair.
    """
    generator = snapshot.generator("window ends")
    ritz, upper = top_between(
        squares(window, readers), steps=pairs, ratio=RATIO**2, failure=FAILURE / 2, generator=generator
    )
    values = ritz.values[..., -1].clamp_min(0)
    if not bool(torch.isfinite(upper).all()):
        raise Unmeasurable("products with the window are not finite")
    for rows, high in ((now.frame, upper[0]), (now.noise, upper[-1])):
        if bool(rows[:, : now.size].any()) and not float(high) > 0:
            raise Unmeasurable("products with the window and back are too small for the type of the parameters")
    ends = zip(values.tolist(), upper.clamp_min(0).tolist())
    norms = [(log(low) / 2 + now.frame_log, log(high) / 2 + now.frame_log) for low, high in ends]
    noise = NoiseSeen(ritz.basis[:, -1], float(ritz.values[-1].sum()), float(upper[-1]))
    return Ends(norms[:-1], noise)


def check_replays(window: Window, start: torch.Tensor, now: Tangents) -> None:
    """Check that replayed steps push the first direction of the frame to where the real steps pushed it.

    Raises:
        Unmeasurable: if it differs by more than 1 %.

    Cost: one pass.
    """
    again, first = window.forward(start[None])[0], now.frame[0, : now.size]
    if not bool(torch.linalg.vector_norm(again - first) <= 1e-2 * torch.linalg.vector_norm(first)):
        raise Unmeasurable("the steps of the window, replayed at its end, are not those that were taken")
