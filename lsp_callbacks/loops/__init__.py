"""Training loops other than Lightning's Trainer: thin, and all by the same `Monitor`."""

from lsp_callbacks.loops.fabric import watch_fabric
from lsp_callbacks.loops.plain import Watch

__all__ = ["Watch", "watch_fabric"]
