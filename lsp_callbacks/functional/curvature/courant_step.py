"""The Courant number of steps as they were taken, from the loss of their own batches before and after."""

from __future__ import annotations

import torch
from torch import Tensor


def courant_step(slopes: Tensor, changes: Tensor) -> Tensor:
    """Return the curvature along some steps over minus twice their slope, as a ratio of sums over the steps.

    With ``L(theta + u) - L(theta) = g . u + u^T H u / 2 + ...``, where u is the whole update, the change of the loss
    shows the curvature along the step::

        c = u^T H u / (-2 g . u) = 1 + (L(theta + u) - L(theta)) / (-g . u)

    It is 0 where the loss is linear along the step, 1/2 at the step to the least loss along its direction, and above 1
    where the step has raised the loss of its own batch. For gradient descent it is ``lr g^T H g / (2 ||g||^2)``, which
    is at most lr sharpness / 2. Beyond the second order it is an average of the curvature over the step. Steps of
    momentum that go uphill count in both sums.

    Args:
        slopes: ``g . u`` of each step.
        changes: ``L(theta + u) - L(theta)`` of each step, of the same batch with the same random masks.

    Returns:
        One number; NaN where the loss does not fall along the steps, so that the sum of slopes is not negative.

    Cost: none beside the losses.

    Source: Roulet et al. 2024 (their edge along the update); docs/theory.md, section The law of SGD, energies, kinks.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional.curvature import courant_step
        >>> theta, lr = torch.tensor([1.0, 2.0]), 0.5  # L = theta^2 / 2, so that g = theta
        >>> courant_step(-lr * theta**2, ((1 - lr) * theta) ** 2 / 2 - theta**2 / 2)
        tensor(0.2500)
    """
    slope = slopes.sum()
    return torch.where(slope < 0, 1 - changes.sum() / slope, torch.nan)
