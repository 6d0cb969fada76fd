"""Linear algebra on tensors; knows nothing of training."""

from lsp_callbacks.linalg.cocycle import lyapunov_exponents, orthonormalise, push, spectral_radius
from lsp_callbacks.linalg.krylov import (
    Eigenpair,
    Ritz,
    lanczos,
    norm_upper,
    operator_norm,
    spectrum_bounds,
    top_between,
)
from lsp_callbacks.linalg.norms import norm, norms, power_iteration, unit
from lsp_callbacks.linalg.operator import LinearOperator, from_matrix, identity_like
from lsp_callbacks.linalg.quadrature import Quadrature, quadratures
from lsp_callbacks.linalg.sketch import Sketch

__all__ = [
    "Eigenpair",
    "LinearOperator",
    "Quadrature",
    "Ritz",
    "Sketch",
    "from_matrix",
    "identity_like",
    "lanczos",
    "lyapunov_exponents",
    "norm",
    "norm_upper",
    "norms",
    "operator_norm",
    "orthonormalise",
    "power_iteration",
    "push",
    "quadratures",
    "spectral_radius",
    "spectrum_bounds",
    "top_between",
    "unit",
]
