"""What the page's heat maps draw: layers and blocks over time, as data for its script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.report.curves import latest, readings
from lsp_callbacks.report.logs.causes import LARGEST, stated
from lsp_callbacks.report.logs.logged_run import layers_of
from lsp_callbacks.report.page.decimation import Map, map_of
from lsp_callbacks.report.page.figures import number
from lsp_callbacks.report.page.judged_run import JudgedRun
from lsp_callbacks.report.table import keys_of_a_run

#: Cells of all maps of a page, columns of one at most and at least, rows of one at most.
CELLS, COLUMNS, FEWEST, ROWS = 240_000, 400, 40, 300
#: Values at which nothing grows, of kinds that have one; of 1 the map shows the logarithm.
NEUTRAL = {
    "residual_gain": 0.0, "residual_gain_bound": 0.0, "residual_m": 0.0, "lyapunov_spectrum": 0.0,
    "sigma_x": 1.0, "forward_gain": 1.0, "backward_gain": 1.0, "player_courant": 1.0, "residual_cfl": 1.0,
    "clarke_sigma_lower": 1.0, "clarke_sigma_upper": 1.0,
}  # fmt: skip
#: Ratio of the largest to the least value above which colours are logarithmic.
DECADES = 30.0


@dataclass(frozen=True)
class Colours:
    """A scale of colours, shared by the maps of one kind.

    Attributes:
        low: value of the first colour.
        high: of the last one.
        log: whether colours follow the logarithm.
        neutral: value of the colour in the middle; None for a scale that has none.
    """

    low: float
    high: float
    log: bool
    neutral: float | None


def heat_maps(runs: Sequence[JudgedRun]) -> list[dict[str, Any]]:
    """Return one group of maps a kind of number, with a map for each run that has it."""
    keys = keys_of_a_run()
    by_run = [layers_of(run.logged.history) for run in runs]
    kinds = dict.fromkeys(kind for kind in LARGEST if any(kind in layers for layers in by_run))
    kinds |= dict.fromkeys(kind for layers in by_run for kind in layers)
    rows = sum(min(len(curves), ROWS) for layers in by_run for curves in layers.values())
    columns = max(FEWEST, min(COLUMNS, CELLS // max(rows, 1)))
    groups = []
    for kind in kinds:
        present = {
            i: layers[kind] for i, layers in enumerate(by_run) if any(map(readings, layers.get(kind, {}).values()))
        }
        if not present:
            continue
        scale = colours(kind, [v for curves in present.values() for curve in curves.values() for v in curve.values])
        neutral = NEUTRAL.get(kind, 0.0)
        about = stated(keys, f"{kind}/")
        maps = [_map(map_of(c, neutral=neutral, columns=columns, rows=ROWS), i, c) for i, c in present.items()]
        groups.append({"kind": kind, "about": about.meaning, "unit": about.unit, "scale": asdict(scale), "maps": maps})
    return groups


def colours(kind: str, values: Sequence[float]) -> Colours:
    """Return the scale for values of a kind: symmetric around the neutral value where there is one."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    neutral = NEUTRAL.get(kind)
    if neutral == 0.0:
        reach = max(-low, high, 1e-12)
        return Colours(-reach, reach, False, 0.0)
    if neutral is not None:
        logs = [abs(math.log(value)) for value in finite if value > 0]
        reach = math.exp(min(max(logs, default=0.0), 50.0)) if max(logs, default=0.0) > 1e-3 else 1.001
        return Colours(1 / reach, reach, True, 1.0)
    return Colours(low, high if high > low else low + 1e-12, low > 0 and high > DECADES * low, None)


def _map(map_: Map, run: int, curves: dict[str, Curve]) -> dict[str, Any]:
    """Return a map for the script; a measurement that failed is "x", one that was not made is null."""
    cells = [[v if v is None else "x" if math.isnan(v) else _short(v) for v in row] for row in map_.values]
    return {
        "run": run, "layers": map_.layers, "spans": map_.spans, "values": cells, "columns": map_.columns,
        "left_out": map_.left_out, "table": [_row(name, curves[name]) for name in map_.layers],
    }  # fmt: skip


def _short(value: float) -> float | str | None:
    return float(f"{value:.3g}") if math.isfinite(value) else number(value)


def _row(name: str, curve: Curve) -> list[Any]:
    """Return first, largest, its step, and last reading of a layer, for the table beside the map."""
    pairs = [(v, s) for s, v in zip(curve.steps, curve.values) if not math.isnan(v)]
    largest, step = max(pairs, key=lambda pair: pair[0], default=(math.nan, -1))
    first = pairs[0][0] if pairs else math.nan
    return [name, *(number(value) for value in (first, largest)), step, number(latest(curve))]
