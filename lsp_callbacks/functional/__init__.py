"""Pure functions: the definitions of what is measured."""

from lsp_callbacks.functional.curvature.batch_sharpness import (
    BatchSharpnessResult,
    batch_sharpness,
    curvature_along_gradient,
)
from lsp_callbacks.functional.curvature.condition import condition, condition_lower, loss_condition_lower
from lsp_callbacks.functional.curvature.loss_hessian import loss_hessian
from lsp_callbacks.functional.curvature.marchenko_pastur import (
    MarchenkoPastur,
    cumulative,
    density,
    fit_marchenko_pastur,
)
from lsp_callbacks.functional.curvature.secant import Secant, secant
from lsp_callbacks.functional.curvature.sharpness import sharpness
from lsp_callbacks.functional.curvature.spectral_density import Spectrum, spectral_density
from lsp_callbacks.functional.curvature.stability_constant import stability_constant
from lsp_callbacks.functional.network.activations import activation_lipschitz, activation_slope
from lsp_callbacks.functional.network.batch_norm import Drift, batch_norm_drift
from lsp_callbacks.functional.network.chain_lipschitz import chain_lipschitz
from lsp_callbacks.functional.network.clarke import GeneralizedNorm, RelaxedJacobian, generalized_norm
from lsp_callbacks.functional.network.depth_profile import DepthProfile, depth_profile
from lsp_callbacks.functional.network.gains import Gains, LayerSizes, gains
from lsp_callbacks.functional.network.kurtosis import excess_kurtosis
from lsp_callbacks.functional.network.layer_operators import weight_operators
from lsp_callbacks.functional.network.lipschitz import layer_lipschitz, lipschitz_lower
from lsp_callbacks.functional.network.residual import ResidualStability, residual_stability
from lsp_callbacks.functional.network.robustness import Sensitivity, sensitivity
from lsp_callbacks.functional.network.spectral_norm import log_sum, spectral_norm, weight_norms
from lsp_callbacks.functional.network.units import Units, units
from lsp_callbacks.functional.numerics.first_fault import Fault, first_fault
from lsp_callbacks.functional.numerics.numeric_range import NumericRange, headroom, lost_share, numeric_range
from lsp_callbacks.functional.sgd.gradient_noise import GradientNoise, batch_variance, gradient_noise
from lsp_callbacks.functional.sgd.mean_square import (
    gd_critical_lr,
    mean_square_lr,
    second_moment,
    second_moment_exponent,
)
from lsp_callbacks.functional.sgd.modes import Modes, UpdateRule, reduce, regularity
from lsp_callbacks.functional.sgd.moment_exponent import moment_exponent
from lsp_callbacks.functional.sgd.robbins_monro import PowerLaw, RateDecay, RobbinsMonro, rate_decay, robbins_monro
from lsp_callbacks.functional.sgd.sgd_law import NoiseFit, SGDLawResult, fit_noise, noise_gain, noise_lipschitz, sgd_law
from lsp_callbacks.functional.sgd.sgd_stability import (
    Exponent,
    finite_time_exponents,
    gd_exponent,
    sgd_exponent,
    sum_of_exponents,
)
from lsp_callbacks.functional.sgd.stability_diagram import (
    CriticalRate,
    StabilityDiagram,
    critical_lr,
    stability_diagram,
)
from lsp_callbacks.functional.trajectory.dissipation import DissipationResult, dissipation
from lsp_callbacks.functional.trajectory.leave_one_out import LeaveOneOutResult, data_response, leave_one_out
from lsp_callbacks.functional.trajectory.lyapunov import (
    exponent_bounds,
    plane_map,
    rescale,
    sharp_mode_exponent,
    sharp_plane,
    window_exponent,
)
from lsp_callbacks.functional.trajectory.proximal import Box, MaxNorm, Only, Ridge, SoftThreshold, SpectralClip
from lsp_callbacks.functional.trajectory.proximal_step import Promise, promise, proximal_gain
from lsp_callbacks.functional.trajectory.statistics import batch_means, fieller, student_bounds, student_quantile
from lsp_callbacks.functional.trajectory.training_exponent import training_exponent
from lsp_callbacks.functional.trajectory.training_profile import (
    Tangents,
    TrainingProfile,
    function_growth,
    pushed,
    tangents,
    training_profile,
)
from lsp_callbacks.linalg import lyapunov_exponents

__all__ = [
    "BatchSharpnessResult",
    "Box",
    "CriticalRate",
    "DepthProfile",
    "DissipationResult",
    "Drift",
    "Exponent",
    "Fault",
    "Gains",
    "GeneralizedNorm",
    "GradientNoise",
    "LayerSizes",
    "LeaveOneOutResult",
    "MarchenkoPastur",
    "MaxNorm",
    "Modes",
    "NoiseFit",
    "NumericRange",
    "Only",
    "PowerLaw",
    "Promise",
    "RateDecay",
    "RelaxedJacobian",
    "ResidualStability",
    "Ridge",
    "RobbinsMonro",
    "SGDLawResult",
    "Secant",
    "Sensitivity",
    "SoftThreshold",
    "SpectralClip",
    "Spectrum",
    "StabilityDiagram",
    "Tangents",
    "TrainingProfile",
    "Units",
    "UpdateRule",
    "activation_lipschitz",
    "activation_slope",
    "batch_means",
    "batch_norm_drift",
    "batch_sharpness",
    "batch_variance",
    "chain_lipschitz",
    "condition",
    "condition_lower",
    "critical_lr",
    "cumulative",
    "curvature_along_gradient",
    "data_response",
    "density",
    "depth_profile",
    "dissipation",
    "excess_kurtosis",
    "exponent_bounds",
    "fieller",
    "finite_time_exponents",
    "first_fault",
    "fit_marchenko_pastur",
    "fit_noise",
    "function_growth",
    "gains",
    "gd_critical_lr",
    "gd_exponent",
    "generalized_norm",
    "gradient_noise",
    "headroom",
    "layer_lipschitz",
    "leave_one_out",
    "lipschitz_lower",
    "log_sum",
    "loss_condition_lower",
    "loss_hessian",
    "lost_share",
    "lyapunov_exponents",
    "mean_square_lr",
    "moment_exponent",
    "noise_gain",
    "noise_lipschitz",
    "numeric_range",
    "plane_map",
    "promise",
    "proximal_gain",
    "pushed",
    "rate_decay",
    "reduce",
    "regularity",
    "rescale",
    "residual_stability",
    "robbins_monro",
    "secant",
    "second_moment",
    "second_moment_exponent",
    "sensitivity",
    "sgd_exponent",
    "sgd_law",
    "sharp_mode_exponent",
    "sharp_plane",
    "sharpness",
    "spectral_density",
    "spectral_norm",
    "stability_constant",
    "stability_diagram",
    "student_bounds",
    "student_quantile",
    "sum_of_exponents",
    "tangents",
    "training_exponent",
    "training_profile",
    "units",
    "weight_norms",
    "weight_operators",
    "window_exponent",
]
