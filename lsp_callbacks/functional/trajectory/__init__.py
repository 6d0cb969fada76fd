"""The training map and its products along a run."""

from lsp_callbacks.functional.trajectory.dissipation import DissipationResult, dissipation
from lsp_callbacks.functional.trajectory.leave_one_out import LeaveOneOutResult, data_response, leave_one_out
from lsp_callbacks.functional.trajectory.lyapunov import (
    exponent_bounds,
    plane_map,
    sharp_mode_exponent,
    sharp_plane,
    window_exponent,
)
from lsp_callbacks.functional.trajectory.proximal import Box, MaxNorm, Only, Ridge, SoftThreshold, SpectralClip
from lsp_callbacks.functional.trajectory.proximal_step import ProximalBounds, proximal_bounds, proximal_gain
from lsp_callbacks.functional.trajectory.statistics import batch_means, fieller, student_bounds, student_quantile
from lsp_callbacks.functional.trajectory.training_exponent import training_exponent
from lsp_callbacks.functional.trajectory.training_profile import (
    Tangents,
    TrainingProfile,
    function_growth,
    push_tangents,
    random_tangents,
    training_profile,
)
from lsp_callbacks.linalg.logs import rescale

__all__ = [
    "Box",
    "DissipationResult",
    "LeaveOneOutResult",
    "MaxNorm",
    "Only",
    "ProximalBounds",
    "Ridge",
    "SoftThreshold",
    "SpectralClip",
    "Tangents",
    "TrainingProfile",
    "batch_means",
    "data_response",
    "dissipation",
    "exponent_bounds",
    "fieller",
    "function_growth",
    "leave_one_out",
    "plane_map",
    "proximal_bounds",
    "proximal_gain",
    "push_tangents",
    "random_tangents",
    "rescale",
    "sharp_mode_exponent",
    "sharp_plane",
    "student_bounds",
    "student_quantile",
    "training_exponent",
    "training_profile",
    "window_exponent",
]
