"""Hessian products by central differences, against which others are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.operators.curvature.finite_differences import FIRST, Differences
from lsp_callbacks.step.snapshot import Snapshot


def central_difference(snapshot: Snapshot, v: Tensor, far: float) -> tuple[Tensor, float]:
    """Return the central difference of gradients along a unit vector, and the distance to either side.

    Args:
        snapshot: a step.
        v: the unit vector, flat.
        far: multiple of the first distance of `Differences`.

    Cost: two gradients.
    """
    differences = Differences(snapshot, torch.zeros_like(v))
    distance = far * FIRST * (differences.reach(v) or differences.eps**0.5)
    ends = [differences.difference(v, 1.0, sign * distance).change for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * distance), distance
