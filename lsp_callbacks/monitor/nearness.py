"""How near a Courant number is to the edge of stability, in a few levels."""

from __future__ import annotations

import math

#: Courant numbers at which the headline number begins to be measured more often, and from which on most often.
FAR, NEAR = 0.5, 0.75
#: Levels of nearness between the two: few, so that it seldom changes.
LEVELS = 8


def nearness(courant: float) -> float:
    """Return how near the edge of stability a Courant number is, from 0 (below 1/2, or NaN) to 1 (from 3/4 on).

    A growing learning rate is near well before it reaches the edge. In eighths, so that it seldom changes.

    Example:
        >>> from lsp_callbacks.monitor.nearness import nearness
        >>> [nearness(courant) for courant in (0.0, 0.5, 0.625, 0.75, 2.0, float("nan"))]
        [0.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    """
    if not courant > FAR:
        return 0.0
    return math.floor(LEVELS * min(1.0, (courant - FAR) / (NEAR - FAR))) / LEVELS


def nearer(near: float) -> float:
    """Return the Courant number from which on the nearness is larger than this one."""
    return math.inf if near >= 1 else FAR + (LEVELS * near + 1) / LEVELS * (NEAR - FAR)
