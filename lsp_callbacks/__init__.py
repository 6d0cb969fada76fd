"""Stability of training, measured while it runs."""

from lsp_callbacks.callbacks import (
    CapLearningRate,
    RollBackOnInstability,
    StabilityMonitor,
    StabilityPanel,
    StabilityPruner,
    StabilityReport,
    StabilityReporter,
    StopOnInstability,
)
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.history import Curve, History, Observation
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.quantities import (
    BatchSharpness,
    ClarkeProfile,
    ClarkeTraining,
    CourantStep,
    CriticalSharpness,
    Dissipation,
    LeaveOneOut,
    Lyapunov,
    LyapunovTrajectory,
    MeanSquareStability,
    Numerics,
    ProximalStep,
    Quantity,
    ResidualCFL,
    Robustness,
    SecantRatio,
    SGDLaw,
    SGDStability,
    Sharpness,
    SignalPropagation,
    SpectralDensity,
    SpectralNorm,
    StabilityProfile,
)
from lsp_callbacks.step.players import Player
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.series import Trace
from lsp_callbacks.step.snapshot import Snapshot

__version__ = "0.1.0"
__all__ = [
    "BatchSharpness",
    "CapLearningRate",
    "ClarkeProfile",
    "ClarkeTraining",
    "CourantStep",
    "CriticalSharpness",
    "Curve",
    "Dissipation",
    "Fault",
    "History",
    "LeaveOneOut",
    "Lyapunov",
    "LyapunovTrajectory",
    "MeanSquareStability",
    "Monitor",
    "Numerics",
    "Observation",
    "Player",
    "ProbeSet",
    "ProximalStep",
    "Quantity",
    "ResidualCFL",
    "Robustness",
    "RollBackOnInstability",
    "RunContext",
    "SGDLaw",
    "SGDStability",
    "SecantRatio",
    "Sharpness",
    "SignalPropagation",
    "Snapshot",
    "SpectralDensity",
    "SpectralNorm",
    "StabilityMonitor",
    "StabilityPanel",
    "StabilityProfile",
    "StabilityPruner",
    "StabilityReport",
    "StabilityReporter",
    "StopOnInstability",
    "Trace",
    "Unmeasurable",
]
