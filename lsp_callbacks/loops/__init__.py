"""Training loops other than Lightning's Trainer; all drive the same `StepObserver`."""

from lsp_callbacks.loops.fabric import watch_fabric
from lsp_callbacks.loops.watch import Watch

__all__ = ["Watch", "watch_fabric"]
