"""Curvature of the loss: sharpness, spectra, condition numbers."""

from lsp_callbacks.functional.curvature.batch_sharpness import (
    BatchSharpnessResult,
    batch_sharpness,
    curvature_along_gradient,
)
from lsp_callbacks.functional.curvature.condition import condition, condition_lower, loss_condition_lower
from lsp_callbacks.functional.curvature.courant_step import courant_step
from lsp_callbacks.functional.curvature.critical_sharpness import CriticalSharpness, critical_sharpness
from lsp_callbacks.functional.curvature.critical_step import CriticalStep, critical_step
from lsp_callbacks.functional.curvature.loss_hessian import loss_hessian
from lsp_callbacks.functional.curvature.marchenko_pastur import (
    MarchenkoPastur,
    fit_marchenko_pastur,
    smoothed_cumulative,
    smoothed_density,
)
from lsp_callbacks.functional.curvature.secant import Secant, secant
from lsp_callbacks.functional.curvature.sharpness import sharpness
from lsp_callbacks.functional.curvature.spectral_density import Spectrum, spectral_density
from lsp_callbacks.functional.curvature.stability_constant import stability_constant

__all__ = [
    "BatchSharpnessResult",
    "CriticalSharpness",
    "CriticalStep",
    "MarchenkoPastur",
    "Secant",
    "Spectrum",
    "batch_sharpness",
    "condition",
    "condition_lower",
    "courant_step",
    "critical_sharpness",
    "critical_step",
    "curvature_along_gradient",
    "fit_marchenko_pastur",
    "loss_condition_lower",
    "loss_hessian",
    "secant",
    "sharpness",
    "smoothed_cumulative",
    "smoothed_density",
    "spectral_density",
    "stability_constant",
]
