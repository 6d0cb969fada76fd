"""Pure functions: the definitions of what is measured."""

from lsp_callbacks.functional.batch_sharpness import BatchSharpness, batch_sharpness, curvature_along_gradient
from lsp_callbacks.functional.clarke import GeneralizedNorm, generalized_norm
from lsp_callbacks.functional.diagram import CriticalRate, StabilityDiagram, critical_lr, stability_diagram
from lsp_callbacks.functional.frozen_sgd import FrozenSGD, frozen_sgd
from lsp_callbacks.functional.lyapunov import plane_exponent, rescale, sharp_mode_exponent, sharp_plane
from lsp_callbacks.functional.mean_square import gd_critical_lr, mean_square_lr, second_moment, second_moment_exponent
from lsp_callbacks.functional.modes import Modes, UpdateRule, reduce, regularity
from lsp_callbacks.functional.proximal import Box, MaxNorm, Only, Ridge, SoftThreshold, SpectralClip
from lsp_callbacks.functional.proximal_step import Promise, promise, proximal_gain
from lsp_callbacks.functional.residual import ResidualStability, residual_stability
from lsp_callbacks.functional.secant import Secant, secant
from lsp_callbacks.functional.sgd_stability import (
    Exponent,
    finite_time_exponents,
    gd_exponent,
    sgd_exponent,
    sum_of_exponents,
)
from lsp_callbacks.functional.sharpness import Edge, edge, sharpness, stability_constant
from lsp_callbacks.functional.spectral_norm import log_sum, spectral_norm
from lsp_callbacks.functional.statistics import batch_means, student_bounds, student_quantile
from lsp_callbacks.linalg import lyapunov_exponents

__all__ = [
    "BatchSharpness",
    "Box",
    "CriticalRate",
    "Edge",
    "Exponent",
    "FrozenSGD",
    "GeneralizedNorm",
    "MaxNorm",
    "Modes",
    "Only",
    "Promise",
    "ResidualStability",
    "Ridge",
    "Secant",
    "SoftThreshold",
    "SpectralClip",
    "StabilityDiagram",
    "UpdateRule",
    "batch_means",
    "batch_sharpness",
    "critical_lr",
    "curvature_along_gradient",
    "edge",
    "finite_time_exponents",
    "frozen_sgd",
    "gd_critical_lr",
    "gd_exponent",
    "generalized_norm",
    "log_sum",
    "lyapunov_exponents",
    "mean_square_lr",
    "plane_exponent",
    "promise",
    "proximal_gain",
    "reduce",
    "regularity",
    "rescale",
    "residual_stability",
    "secant",
    "second_moment",
    "second_moment_exponent",
    "sgd_exponent",
    "sharp_mode_exponent",
    "sharp_plane",
    "sharpness",
    "spectral_norm",
    "stability_constant",
    "stability_diagram",
    "student_bounds",
    "student_quantile",
    "sum_of_exponents",
]
