"""From one frozen training step to linear operators."""

from lsp_callbacks.operators.curvature import hessian
from lsp_callbacks.operators.frozen import FrozenRule, frozen_rule
from lsp_callbacks.operators.residual import Block, residual_block
from lsp_callbacks.operators.training import (
    SGDRule,
    decayed_hessian,
    preconditioned_hessian,
    state_weight,
    step_jacobian,
    update_rule,
)
from lsp_callbacks.operators.weights import weight_operators

__all__ = [
    "Block",
    "FrozenRule",
    "SGDRule",
    "decayed_hessian",
    "frozen_rule",
    "hessian",
    "preconditioned_hessian",
    "residual_block",
    "state_weight",
    "step_jacobian",
    "update_rule",
    "weight_operators",
]
