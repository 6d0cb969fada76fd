"""What the measurements of one step spend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lsp_callbacks.monitor.pace import Pace


def union(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what measurements of one step spend gradients on: what several of them spend on the same counts once."""
    shared: dict[str, float] = {}
    for measurement in parts:
        for part, gradients in measurement.items():
            shared[part] = max(shared.get(part, 0.0), gradients)
    return shared


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
        self._shared = union((self._shared, pace.parts or {}))
