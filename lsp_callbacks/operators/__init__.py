"""From one frozen training step to linear operators."""

from lsp_callbacks.operators.curvature.hessian import hessian
from lsp_callbacks.operators.network.residual_block import Block, residual_block
from lsp_callbacks.operators.trajectory.coming_preconditioner import coming_rule
from lsp_callbacks.operators.trajectory.formula_tangent import state_blocks
from lsp_callbacks.operators.trajectory.frozen_preconditioner import (
    FrozenRule,
    decayed_hessian,
    frozen_rule,
    preconditioned_hessian,
)
from lsp_callbacks.operators.trajectory.multi_optimizer import joint_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import state_weight, step_jacobian, step_response, tangent_path

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
]
