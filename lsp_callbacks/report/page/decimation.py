"""Fewer points of long curves and large maps, so that no spike is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lsp_callbacks.monitor.history import Curve


def decimated(curve: Curve, most: int) -> Curve:
    """Return a curve of about ``most`` points at most: the first, least, largest and last of each part of it.

    A failed measurement and an infinite one stay, too: at most two more points for each four.

    Example:
        >>> spike = Curve(list(range(1000)), [0.0] * 500 + [9.0] + [0.0] * 499)
        >>> short = decimated(spike, 40)
        >>> len(short.steps) <= 40, max(short.values), short.steps[-1]
        (True, 9.0, 999)
    """
    count = len(curve.steps)
    if count <= most:
        return curve
    values = np.asarray(curve.values, dtype=float)
    kept: set[int] = set()
    for part in np.array_split(np.arange(count), max(1, most // 4)):
        inside = values[part]
        kept |= {int(part[0]), int(part[-1])}
        finite = np.isfinite(inside)
        if finite.any():
            kept.add(int(part[np.argmin(np.where(finite, inside, np.inf))]))
            kept.add(int(part[np.argmax(np.where(finite, inside, -np.inf))]))
        kept |= {int(part[flags.argmax()]) for flags in (np.isnan(inside), np.isinf(inside)) if flags.any()}
    order = sorted(kept)
    return Curve([curve.steps[i] for i in order], [curve.values[i] for i in order])


@dataclass(frozen=True)
class Map:
    """Values over layers and time.

    Attributes:
        layers: names of the rows.
        spans: first and last step of each column.
        values: a row a layer; None where nothing was measured, NaN where a measurement failed.
        columns: before any were joined.
        left_out: layers that are not among the rows.
    """

    layers: list[str]
    spans: list[tuple[int, int]]
    values: list[list[float | None]]
    columns: int
    left_out: int


def map_of(curves: Mapping[str, Curve], *, neutral: float, columns: int, rows: int) -> Map:
    """Return the map of one kind of number: of readings that share a cell, that which is furthest from ``neutral``.

    Args:
        curves: by layer.
        neutral: value at which nothing is to be seen.
        columns: at most.
        rows: at most; those whose largest distance from ``neutral`` is least are left out.
    """
    layers = list(curves)
    if len(layers) > rows:
        far = sorted(layers, key=lambda name: -_furthest(curves[name].values, neutral))[:rows]
        layers = [name for name in layers if name in set(far)]
    steps = sorted({step for curve in curves.values() for step in curve.steps})
    parts = [steps] if not steps else np.array_split(np.asarray(steps), min(len(steps), columns))
    spans = [(int(part[0]), int(part[-1])) for part in parts if len(part)]
    ends = np.asarray([last for _, last in spans])
    values: list[list[float | None]] = []
    for name in layers:
        row: list[float | None] = [None] * len(spans)
        for column, value in zip(np.searchsorted(ends, curves[name].steps).tolist(), curves[name].values):
            row[column] = _further(row[column], value, neutral)
        values.append(row)
    return Map(layers, spans, values, len(steps), len(curves) - len(layers))


def _further(value: float | None, other: float, neutral: float) -> float:
    if value is None or math.isnan(value):
        return other
    return value if math.isnan(other) or abs(value - neutral) >= abs(other - neutral) else other


def _furthest(values: Sequence[float], neutral: float) -> float:
    return max((abs(value - neutral) for value in values if not math.isnan(value)), default=-1.0)
