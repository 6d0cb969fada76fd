"""How far the optimizer's next step moves each parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.trajectory.optimizer_copy import OptimizerCopy
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_gradient
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.snapshot import Snapshot, computed_once


@computed_once
def displacement(snapshot: Snapshot) -> Tensor:
    """Return ``theta_half - theta``: the change of the parameters by the optimizer's ``step``, flat, in float64.

    The step runs on a copy of the optimizer, with the clipped gradient. `RunContext.prox`, which is applied after the
    step, is not part of it.

    Raises:
        Unmeasurable: no optimizer, a step that is not supported, or one that cannot be tried on a copy.

    Cost: one optimizer step, on copies of parameters and state in double precision. Computed once a step.
    """
    optimizer = snapshot.require_optimizer()
    parameters = list(snapshot.parameters.values())
    gradients = split(clipped_gradient(snapshot).double(), parameters)
    trial = OptimizerCopy(optimizer, parameters)
    before = trial.read([])
    moves = [snapshot.gradient is None or snapshot.gradient[name] is not None for name in snapshot.parameters]
    try:
        trial.step([g if move else None for g, move in zip(gradients, moves)], RandomState())
    except Exception as error:  # whatever the user's optimizer raises
        raise Unmeasurable(
            f"the step of {type(optimizer).__name__} cannot be tried on a copy ({type(error).__name__}: {error}): make "
            "a deep copy of the optimizer able to step, or leave this quantity out"
        ) from error
    with torch.no_grad():
        return trial.read([]) - before
