"""Stability of training, measured while it runs."""

from lsp_callbacks.quantities import Lyapunov, LyapunovTrajectory, Quantity, ResidualCFL, Sharpness, SpectralNorm
from lsp_callbacks.snapshot import Snapshot, Unmeasurable

__all__ = [
    "Lyapunov",
    "LyapunovTrajectory",
    "Quantity",
    "ResidualCFL",
    "Sharpness",
    "Snapshot",
    "SpectralNorm",
    "Unmeasurable",
]
