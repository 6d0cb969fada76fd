"""Stability of training, measured while it runs."""

from lsp_callbacks.callbacks import StabilityMonitor, StabilityReport, StopOnInstability
from lsp_callbacks.monitor import Curve, Monitor, Observation
from lsp_callbacks.quantities import (
    BatchSharpness,
    LeaveOneOut,
    Lyapunov,
    LyapunovTrajectory,
    Quantity,
    ResidualCFL,
    Robustness,
    SGDStability,
    Sharpness,
    SpectralNorm,
)
from lsp_callbacks.snapshot import ProbeSet, Snapshot, Unmeasurable

__all__ = [
    "BatchSharpness",
    "Curve",
    "LeaveOneOut",
    "Lyapunov",
    "LyapunovTrajectory",
    "Monitor",
    "Observation",
    "ProbeSet",
    "Quantity",
    "ResidualCFL",
    "Robustness",
    "SGDStability",
    "Sharpness",
    "Snapshot",
    "SpectralNorm",
    "StabilityMonitor",
    "StabilityReport",
    "StopOnInstability",
    "Unmeasurable",
]
