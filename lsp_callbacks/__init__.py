"""Stability of training, measured while it runs."""

from lsp_callbacks.callbacks import StabilityMonitor, StabilityReport, StopOnInstability
from lsp_callbacks.functional.first_fault import Fault
from lsp_callbacks.monitor import Curve, Monitor, Observation
from lsp_callbacks.quantities import (
    BatchSharpness,
    Lyapunov,
    LyapunovTrajectory,
    Numerics,
    Quantity,
    ResidualCFL,
    SGDStability,
    Sharpness,
    SpectralNorm,
)
from lsp_callbacks.snapshot import ProbeSet, Snapshot, Unmeasurable

__all__ = [
    "BatchSharpness",
    "Curve",
    "Fault",
    "Lyapunov",
    "LyapunovTrajectory",
    "Monitor",
    "Numerics",
    "Observation",
    "ProbeSet",
    "Quantity",
    "ResidualCFL",
    "SGDStability",
    "Sharpness",
    "Snapshot",
    "SpectralNorm",
    "StabilityMonitor",
    "StabilityReport",
    "StopOnInstability",
    "Unmeasurable",
]
