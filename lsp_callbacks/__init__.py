"""Stability of training, measured while it runs."""

from lsp_callbacks.callbacks import StabilityMonitor, StabilityReport, StopOnInstability
from lsp_callbacks.monitor import Curve, Monitor, Observation
from lsp_callbacks.quantities import (
    BatchSharpness,
    Lyapunov,
    LyapunovTrajectory,
    Quantity,
    ResidualCFL,
    SGDStability,
    Sharpness,
    SpectralNorm,
    StabilityProfile,
)
from lsp_callbacks.snapshot import ProbeSet, Snapshot, Unmeasurable

__all__ = [
    "BatchSharpness",
    "Curve",
    "Lyapunov",
    "LyapunovTrajectory",
    "Monitor",
    "Observation",
    "ProbeSet",
    "Quantity",
    "ResidualCFL",
    "SGDStability",
    "Sharpness",
    "Snapshot",
    "SpectralNorm",
    "StabilityMonitor",
    "StabilityProfile",
    "StabilityReport",
    "StopOnInstability",
    "Unmeasurable",
]
