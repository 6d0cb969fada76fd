"""Linear algebra on tensors, independent of training."""

from lsp_callbacks.linalg.cocycle import lyapunov_exponents, orthonormalise, push, spectral_radius
from lsp_callbacks.linalg.followed_norm import FollowedNorm, followed_norm
from lsp_callbacks.linalg.gauss_radau import Images, TopNode
from lsp_callbacks.linalg.lanczos import lanczos
from lsp_callbacks.linalg.operator import (
    LinearOperator,
    from_matrix,
    identity_like,
    inner,
    norm,
    norms,
    power_iteration,
    total_norm,
    unit,
)
from lsp_callbacks.linalg.operator_norm import norm_upper, operator_norm, top_between
from lsp_callbacks.linalg.quadrature import Quadrature, quadratures
from lsp_callbacks.linalg.ritz import Eigenpair, Ritz
from lsp_callbacks.linalg.sketch import Sketch
from lsp_callbacks.linalg.spectrum_bounds import spectrum_bounds

__all__ = [
    "Eigenpair",
    "FollowedNorm",
    "Images",
    "LinearOperator",
    "Quadrature",
    "Ritz",
    "Sketch",
    "TopNode",
    "followed_norm",
    "from_matrix",
    "identity_like",
    "inner",
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
    "total_norm",
    "unit",
]
