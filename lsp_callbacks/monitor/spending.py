"""What the measurements of one step spend."""

from __future__ import annotations

from lsp_callbacks.monitor.pace import Pace


class Spending:
    """What the measurements of one step leave in the account; what several of them spend on the same counts once."""

    def __init__(self, left: float):
        self.left = left
        self.chosen: list[str] = []
        self._shared: dict[str, float] = {}

    def beside(self, pace: Pace) -> float:
        """Return what a measurement costs beside those that were chosen."""
        return sum(max(0.0, price - self._shared.get(part, 0.0)) for part, price in (pace.parts or {}).items())

    def choose(self, name: str, pace: Pace) -> None:
        """Choose a measurement."""
        self.left -= self.beside(pace)
        self.chosen.append(name)
        for part, gradients in (pace.parts or {}).items():
            self._shared[part] = max(self._shared.get(part, 0.0), gradients)
