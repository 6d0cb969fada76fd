"""The callbacks for Lightning's Trainer; beside them, only the commands and the demo import Lightning."""

from lsp_callbacks.callbacks.cap_learning_rate import CapLearningRate
from lsp_callbacks.callbacks.roll_back_on_instability import RollBackOnInstability
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.callbacks.stability_panel import StabilityPanel
from lsp_callbacks.callbacks.stability_report import StabilityReport
from lsp_callbacks.callbacks.stop_on_instability import StopOnInstability
from lsp_callbacks.callbacks.sweeps import StabilityPruner, StabilityReporter

__all__ = [
    "CapLearningRate",
    "RollBackOnInstability",
    "StabilityMonitor",
    "StabilityPanel",
    "StabilityPruner",
    "StabilityReport",
    "StabilityReporter",
    "StopOnInstability",
]
