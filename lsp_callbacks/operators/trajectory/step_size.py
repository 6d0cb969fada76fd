"""How far the optimizer's next step moves each parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.autograd.random_state import RandomState
from lsp_callbacks.operators.trajectory.optimizer_copy import OptimizerCopy
from lsp_callbacks.operators.trajectory.step_jacobian import clipped_gradient, known_optimizer
from lsp_callbacks.step.snapshot import Snapshot, Unmeasurable, split


def displacement(snapshot: Snapshot) -> Tensor:
    """``theta_half - theta``: what the optimizer's own ``step`` does to the parameters, flat, in float64.

    It is taken on a copy of the optimizer, with the step's clipped gradient. What is done to the parameters after the
    step (`RunContext.prox`) is not part of it.

    Raises:
        Unmeasurable: no optimizer, a step that is not modelled, or one that cannot be tried on a copy.

    Cost: one optimizer step, on copies of parameters and state in double precision. Computed once a step.
    """
    return snapshot.once("displacement", lambda: _displacement(snapshot))


def _displacement(snapshot: Snapshot) -> Tensor:
    optimizer = known_optimizer(snapshot)
    parameters = list(snapshot.parameters.values())
    gradients = split(clipped_gradient(snapshot).double(), parameters)
    own = OptimizerCopy(optimizer, parameters)
    before = own.read([])
    moves = [snapshot.gradient is None or snapshot.gradient[name] is not None for name in snapshot.parameters]
    try:
        own.step([g if move else None for g, move in zip(gradients, moves)], RandomState())
    except Exception as error:  # whatever the user's optimizer raises
        raise Unmeasurable(
            f"the step of {type(optimizer).__name__} cannot be tried on a copy ({type(error).__name__}: {error})"
        ) from error
    with torch.no_grad():
        return own.read([]) - before
