"""How a state of a run looks: a kind of colour, and a sign that says the same without one."""

from __future__ import annotations

_CALM, _CARE, _UNKNOWN, _BAD = ("calm", "✓"), ("care", "!"), ("unknown", "?"), ("bad", "✕")
_LOOKS = {"stable": _CALM, "recovered": _CARE, "edge": _CARE, "unknown": _UNKNOWN}


def look(state: str) -> tuple[str, str]:
    """Return "calm", "care", "unknown" or "bad", and the sign of it.

    Example:
        >>> look("stable"), look("not finite")
        (('calm', '✓'), ('bad', '✕'))
    """
    return _LOOKS.get(state, _BAD)
