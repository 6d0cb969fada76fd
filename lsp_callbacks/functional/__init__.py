"""Pure functions: the definitions of what is measured."""

from lsp_callbacks.functional.lyapunov import plane_exponent, rescale, sharp_mode_exponent, sharp_plane
from lsp_callbacks.functional.residual import ResidualStability, residual_stability
from lsp_callbacks.functional.sharpness import Edge, edge, sharpness, stability_constant
from lsp_callbacks.functional.spectral_norm import log_sum, spectral_norm
from lsp_callbacks.functional.statistics import batch_means, student_bounds, student_quantile
from lsp_callbacks.linalg import lyapunov_exponents

__all__ = [
    "Edge",
    "ResidualStability",
    "batch_means",
    "edge",
    "log_sum",
    "lyapunov_exponents",
    "plane_exponent",
    "rescale",
    "residual_stability",
    "sharp_mode_exponent",
    "sharp_plane",
    "sharpness",
    "spectral_norm",
    "stability_constant",
    "student_bounds",
    "student_quantile",
]
