"""From one frozen training step to linear operators."""

from lsp_callbacks.operators.coming import coming_rule
from lsp_callbacks.operators.curvature import hessian
from lsp_callbacks.operators.frozen import FrozenRule, decayed_hessian, frozen_rule, preconditioned_hessian
from lsp_callbacks.operators.game import joint_jacobian
from lsp_callbacks.operators.residual import Block, residual_block
from lsp_callbacks.operators.training import state_blocks, state_weight, step_jacobian, step_response, tangent_path
from lsp_callbacks.operators.weights import weight_operators

__all__ = [
    "Block",
    "FrozenRule",
    "coming_rule",
    "decayed_hessian",
    "frozen_rule",
    "hessian",
    "joint_jacobian",
    "preconditioned_hessian",
    "residual_block",
    "state_blocks",
    "state_weight",
    "step_jacobian",
    "step_response",
    "tangent_path",
    "weight_operators",
]
