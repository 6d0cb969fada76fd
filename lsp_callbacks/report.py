"""What a run's curves say: one sentence, a table, a picture."""

from __future__ import annotations

from collections.abc import Mapping

from lsp_callbacks.monitor import Curve


def verdict(history: Mapping[str, Curve]) -> str:
    """One sentence."""
    return "lsp_callbacks: measured"
