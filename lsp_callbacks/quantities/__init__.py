"""Quantities: torchmetrics Metrics on frozen training steps. A new one is one file, and one line below.

What a quantity reports, what its numbers mean and cost, and which presets hold it follow from its class; the tables of
the report and of the documentation come from there, too: ``python -m lsp_callbacks.quantities`` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# One line a quantity, in the order of measurement: steps share the work of those before them.
# isort: off
from lsp_callbacks.quantities.base import Quantity as Quantity
from lsp_callbacks.quantities.key import Key as Key
from lsp_callbacks.quantities.network.spectral_norm import SpectralNorm as SpectralNorm
from lsp_callbacks.quantities.network.residual_cfl import ResidualCFL as ResidualCFL
from lsp_callbacks.quantities.curvature.sharpness import Sharpness as Sharpness
from lsp_callbacks.quantities.sgd.mean_square_stability import MeanSquareStability as MeanSquareStability
from lsp_callbacks.quantities.sgd.sgd_stability import SGDStability as SGDStability
from lsp_callbacks.quantities.trajectory.lyapunov import Lyapunov as Lyapunov
from lsp_callbacks.quantities.trajectory.lyapunov_trajectory import LyapunovTrajectory as LyapunovTrajectory
from lsp_callbacks.quantities.curvature.batch_sharpness import BatchSharpness as BatchSharpness
from lsp_callbacks.quantities.trajectory.dissipation import Dissipation as Dissipation
from lsp_callbacks.quantities.sgd.sgd_law import SGDLaw as SGDLaw
from lsp_callbacks.quantities.curvature.spectral_density import SpectralDensity as SpectralDensity
from lsp_callbacks.quantities.network.signal_propagation import SignalPropagation as SignalPropagation
from lsp_callbacks.quantities.numerics.numerics import Numerics as Numerics
from lsp_callbacks.quantities.network.robustness import Robustness as Robustness
from lsp_callbacks.quantities.trajectory.leave_one_out import LeaveOneOut as LeaveOneOut
from lsp_callbacks.quantities.trajectory.stability_profile import StabilityProfile as StabilityProfile
from lsp_callbacks.quantities.network.clarke_profile import ClarkeProfile as ClarkeProfile
from lsp_callbacks.quantities.trajectory.clarke_training import ClarkeTraining as ClarkeTraining
from lsp_callbacks.quantities.curvature.secant_ratio import SecantRatio as SecantRatio
from lsp_callbacks.quantities.trajectory.proximal_step import ProximalStep as ProximalStep
from lsp_callbacks.quantities.curvature.courant_step import CourantStep as CourantStep
from lsp_callbacks.quantities.curvature.critical_sharpness import CriticalSharpness as CriticalSharpness
# isort: on

#: All quantities by name, in the order of the lines above.
REGISTRY: dict[str, type[Quantity]] = {
    member.name: member
    for member in list(globals().values())
    if isinstance(member, type) and issubclass(member, Quantity) and member.name
}
PRESETS: dict[str, tuple[str, ...]] = {
    "economy": ("spectral_norm", "sharpness"),
    "default": ("spectral_norm", "residual_cfl", "sharpness", "mean_square_stability", "lyapunov", "courant_step"),
    "full": tuple(name for name, quantity in REGISTRY.items() if not quantity.by_name_only),
}


def build(names: str | Quantity | Sequence[str | Quantity], **settings: Any) -> tuple[list[Quantity], set[str]]:
    """Return quantities from a preset, names or instances.

    Args:
        names: a preset, a name or an instance, or several names and instances.
        settings: constructor arguments by quantity name, ``{"lyapunov": {"window": 4}}``.

    Returns:
        The quantities, and the names of those that were given by name or instance, not by a preset.

    Raises:
        ValueError: for an unknown or doubled name.
    """
    if isinstance(names, str) and names in PRESETS:
        return [REGISTRY[name](**settings.get(name, {})) for name in PRESETS[names]], set()
    if not isinstance(names, str | Quantity | Sequence):
        raise ValueError(f"quantities={names!r}: give a preset, a name, or a list of names and quantities")
    quantities = []
    for name in [names] if isinstance(names, str | Quantity) else names:
        if isinstance(name, Quantity):
            quantities.append(name)
        elif isinstance(name, str) and name in REGISTRY:
            quantities.append(REGISTRY[name](**settings.get(name, {})))
        else:
            raise ValueError(
                f"quantities={name!r} is neither a preset ({', '.join(PRESETS)}) nor a quantity ({', '.join(REGISTRY)})"
            )
    given = [quantity.name for quantity in quantities]
    if not given:
        raise ValueError("quantities is empty: give at least one, or train without the callback")
    if len(set(given)) < len(given):
        raise ValueError(f"quantities={given}: each quantity can be given once")
    return quantities, set(given)


__all__ = ["PRESETS", "REGISTRY", "Key", "Quantity", "build"]
__all__ += sorted(quantity.__name__ for quantity in REGISTRY.values())
