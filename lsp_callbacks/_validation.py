"""Refuses bad arguments: the message names the argument, its value and the remedy."""

from __future__ import annotations

import math
from typing import Any


def whole(name: str, value: Any, least: int, *, instead: str = "") -> int:
    """Return a whole number of at least ``least``.

    Args:
        name: of the argument.
        value: what the user gave.
        least: the smallest that makes sense.
        instead: what else may be given, for the message.

    Raises:
        ValueError: for anything else; True and 3.0 are no whole numbers.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}{instead}")
    return value


def choice(name: str, value: Any, *options: str) -> Any:
    """One of several words.

    Raises:
        ValueError: for anything else.
    """
    if value not in options:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, options))}")
    return value


def number(name: str, value: Any, *, above: float = -math.inf, most: float = math.inf, instead: str = "") -> float:
    """Return a real number in ``(above, most]``.

    Raises:
        ValueError: for anything else, NaN included.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value <= most:
        ends = f" above {above:g}" * (above > -math.inf) + f" and at most {most:g}" * (most < math.inf)
        raise ValueError(f"{name}={value!r}: give a number{ends}{instead}")
    return value
