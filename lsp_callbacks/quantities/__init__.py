"""Quantities: torchmetrics Metrics on frozen training steps. To add one: one file, one line in ``REGISTRY``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.curvature.batch_sharpness import BatchSharpness
from lsp_callbacks.quantities.curvature.secant_ratio import SecantRatio
from lsp_callbacks.quantities.curvature.sharpness import Sharpness
from lsp_callbacks.quantities.curvature.spectral_density import SpectralDensity
from lsp_callbacks.quantities.network.clarke_profile import ClarkeProfile
from lsp_callbacks.quantities.network.residual_cfl import ResidualCFL
from lsp_callbacks.quantities.network.robustness import Robustness
from lsp_callbacks.quantities.network.signal_propagation import SignalPropagation
from lsp_callbacks.quantities.network.spectral_norm import SpectralNorm
from lsp_callbacks.quantities.numerics.numerics import Numerics
from lsp_callbacks.quantities.sgd.sgd_law import SGDLaw
from lsp_callbacks.quantities.sgd.sgd_stability import SGDStability
from lsp_callbacks.quantities.trajectory.clarke_training import ClarkeTraining
from lsp_callbacks.quantities.trajectory.dissipation import Dissipation
from lsp_callbacks.quantities.trajectory.leave_one_out import LeaveOneOut
from lsp_callbacks.quantities.trajectory.lyapunov import Lyapunov, LyapunovTrajectory
from lsp_callbacks.quantities.trajectory.proximal_step import ProximalStep
from lsp_callbacks.quantities.trajectory.stability_profile import StabilityProfile

REGISTRY: dict[str, type[Quantity]] = {
    quantity.name: quantity
    for quantity in (
        SpectralNorm,
        ResidualCFL,
        Sharpness,
        SGDStability,
        Lyapunov,
        LyapunovTrajectory,
        BatchSharpness,
        Dissipation,
        SGDLaw,
        SpectralDensity,
        SignalPropagation,
        Numerics,
        Robustness,
        LeaveOneOut,
        StabilityProfile,
        ClarkeProfile,
        ClarkeTraining,
        SecantRatio,
        ProximalStep,
    )
}
#: "full" is all but `ClarkeTraining`, which takes whole derivatives: for small models, by name.
PRESETS: dict[str, tuple[str, ...]] = {
    "economy": ("spectral_norm", "sharpness"),
    "default": ("spectral_norm", "residual_cfl", "sharpness", "sgd_stability", "lyapunov"),
    "full": (
        "spectral_norm",
        "residual_cfl",
        "sharpness",
        "sgd_stability",
        "lyapunov",
        "lyapunov_trajectory",
        "batch_sharpness",
        "dissipation",
        "sgd_law",
        "spectral_density",
        "signal_propagation",
        "numerics",
        "robustness",
        "leave_one_out",
        "stability_profile",
        "clarke_profile",
        "secant_ratio",
        "proximal_step",
    ),
}


def build(names: str | Quantity | Sequence[str | Quantity], **settings: Any) -> tuple[list[Quantity], set[str]]:
    """Quantities from a preset, names or instances.

    Args:
        names: one or several.
        settings: constructor arguments by quantity name, ``{"lyapunov": {"window": 4}}``.

    Returns:
        The quantities, and the names of those that were asked for by name or instance, not by a preset.

    Raises:
        ValueError: for an unknown or doubled name.
    """
    if isinstance(names, str) and names in PRESETS:
        return [REGISTRY[name](**settings.get(name, {})) for name in PRESETS[names]], set()
    if not isinstance(names, str | Quantity | Sequence):
        raise ValueError(f"quantities={names!r}: give a preset, a name, or a list of names and quantities")
    quantities = []
    for one in [names] if isinstance(names, str | Quantity) else names:
        if isinstance(one, Quantity):
            quantities.append(one)
        elif isinstance(one, str) and one in REGISTRY:
            quantities.append(REGISTRY[one](**settings.get(one, {})))
        else:
            raise ValueError(
                f"quantities={one!r} is neither a preset ({', '.join(PRESETS)}) nor a quantity ({', '.join(REGISTRY)})"
            )
    named = [quantity.name for quantity in quantities]
    if not named:
        raise ValueError("quantities is empty: name at least one, or leave the callback out")
    if len(set(named)) < len(named):
        raise ValueError(f"quantities={named}: each quantity can be given once")
    return quantities, set(named)


__all__ = [
    "PRESETS",
    "REGISTRY",
    "BatchSharpness",
    "ClarkeProfile",
    "ClarkeTraining",
    "Dissipation",
    "LeaveOneOut",
    "Lyapunov",
    "LyapunovTrajectory",
    "Numerics",
    "ProximalStep",
    "Quantity",
    "ResidualCFL",
    "Robustness",
    "SGDLaw",
    "SGDStability",
    "SecantRatio",
    "Sharpness",
    "SignalPropagation",
    "SpectralDensity",
    "SpectralNorm",
    "StabilityProfile",
    "build",
]
