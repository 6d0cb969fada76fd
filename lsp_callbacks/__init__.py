"""Stability of training, measured while it runs."""

from lsp_callbacks.callbacks import StabilityMonitor, StabilityReport, StopOnInstability
from lsp_callbacks.monitor import Curve, Monitor, Observation
from lsp_callbacks.quantities import (
    BatchSharpness,
    ClarkeProfile,
    Lyapunov,
    LyapunovTrajectory,
    ProximalStep,
    Quantity,
    ResidualCFL,
    SecantRatio,
    SGDStability,
    Sharpness,
    SpectralNorm,
)
from lsp_callbacks.snapshot import ProbeSet, Snapshot, Unmeasurable

__all__ = [
    "BatchSharpness",
    "ClarkeProfile",
    "Curve",
    "Lyapunov",
    "LyapunovTrajectory",
    "Monitor",
    "Observation",
    "ProbeSet",
    "ProximalStep",
    "Quantity",
    "ResidualCFL",
    "SGDStability",
    "SecantRatio",
    "Sharpness",
    "Snapshot",
    "SpectralNorm",
    "StabilityMonitor",
    "StabilityReport",
    "StopOnInstability",
    "Unmeasurable",
]
