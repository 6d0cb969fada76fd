"""Stability of training, measured while it runs."""

from lsp_callbacks.callbacks import StabilityMonitor, StabilityReport, StopOnInstability
from lsp_callbacks.monitor import Curve, Monitor, Observation
from lsp_callbacks.players import Player
from lsp_callbacks.quantities import (
    BatchSharpness,
    Lyapunov,
    LyapunovTrajectory,
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
    "Lyapunov",
    "LyapunovTrajectory",
    "Monitor",
    "Observation",
    "Player",
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
