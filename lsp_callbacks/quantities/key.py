"""What is said of one number that a quantity reports: unit, meaning, and what to do when it is bad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

#: All keys begin with it.
PREFIX = "stability/"
#: Units that several quantities share.
CURVATURE, NATS = "loss / parameter^2", "nats per step"


@dataclass(frozen=True)
class Key:
    """One number of a quantity, as its class states it in ``KEYS``.

    Attributes:
        meaning: one plain sentence.
        unit: in words, such as "nats per step"; empty for a pure number.
        advice: what to do when the number is bad; empty where its value alone asks for nothing.
        optional: whether it is left out of a measurement for which it is not defined.
        threshold: the report shows larger values in red.
        error_of: name of the number whose error this one is; the report shows it beside that number.
        error_format: in which words.
        may_stop: whether `StopOnInstability` may watch it.
    """

    meaning: str
    unit: str = ""
    advice: str = ""
    optional: bool = False
    threshold: float = math.inf
    error_of: str = ""
    error_format: str = "± {:.2g}"
    may_stop: bool = True


def standard_error(name: str, unit: str = "", *, optional: bool = False) -> Key:
    """Return the key of the standard error of another number."""
    return Key(f"Standard error of {name}.", unit, optional=optional, error_of=name)


def relative_residual(name: str, meaning: str, *, optional: bool = False) -> Key:
    """Return the key of an iteration's residual, relative to the number that it found."""
    return Key(meaning, optional=optional, error_of=name, error_format="residual {:.1%}")


def relative_bar(name: str, *, optional: bool = False) -> Key:
    """Return the key of an error bar relative to a number."""
    meaning = f"How far from {name} the true value can be, relative to it."
    return Key(meaning, optional=optional, error_of=name, error_format="within {:.1%}")


def is_global(key: str) -> bool:
    """Return whether a key is that of the whole network, ``stability/<name>``, not of a layer."""
    return key.count("/") == 1


def scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return the finite global values: callbacks that stop at a NaN may see these."""
    return {key: value for key, value in values.items() if is_global(key) and math.isfinite(value)}
