"""The network as a map from layer to layer."""

from lsp_callbacks.functional.network.activations import activation_lipschitz, activation_slope
from lsp_callbacks.functional.network.batch_norm import Drift, batch_norm_drift
from lsp_callbacks.functional.network.chain_lipschitz import chain_lipschitz
from lsp_callbacks.functional.network.clarke import GeneralizedNorm, RelaxedJacobian, generalized_norm
from lsp_callbacks.functional.network.depth_profile import DepthProfile, depth_profile
from lsp_callbacks.functional.network.gains import Gains, LayerSizes, gains
from lsp_callbacks.functional.network.inactive_units import InactiveUnits, inactive_units
from lsp_callbacks.functional.network.kurtosis import excess_kurtosis
from lsp_callbacks.functional.network.layer_operators import weight_operators
from lsp_callbacks.functional.network.lipschitz import layer_lipschitz, lipschitz_lower
from lsp_callbacks.functional.network.residual import ResidualStability, residual_stability
from lsp_callbacks.functional.network.robustness import Sensitivity, sensitivity
from lsp_callbacks.functional.network.spectral_norm import log_sum, spectral_norm, weight_norms

__all__ = [
    "DepthProfile",
    "Drift",
    "Gains",
    "GeneralizedNorm",
    "InactiveUnits",
    "LayerSizes",
    "RelaxedJacobian",
    "ResidualStability",
    "Sensitivity",
    "activation_lipschitz",
    "activation_slope",
    "batch_norm_drift",
    "chain_lipschitz",
    "depth_profile",
    "excess_kurtosis",
    "gains",
    "generalized_norm",
    "inactive_units",
    "layer_lipschitz",
    "lipschitz_lower",
    "log_sum",
    "residual_stability",
    "sensitivity",
    "spectral_norm",
    "weight_norms",
    "weight_operators",
]
