"""What the page's figures draw: curves over time, as data for its script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lsp_callbacks.monitor.courant_source import COURANT, MEAN_SQUARE, SOURCE
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.quantities.key import PREFIX, is_global
from lsp_callbacks.report.curves import AVERAGE, SMOOTHING, averaged, centred_median, readings, smoothing_window
from lsp_callbacks.report.logs.causes import courant_source
from lsp_callbacks.report.logs.events import Event
from lsp_callbacks.report.logs.facts import stride_of
from lsp_callbacks.report.page.decimation import decimated
from lsp_callbacks.report.page.judged_run import JudgedRun
from lsp_callbacks.report.table import keys_of_a_run

#: Points of all curves of a page, and of one curve at most and at least.
POINTS, MOST, LEAST = 160_000, 2_000, 200
#: Digits of numbers on the page.
DIGITS = 5
#: Marks in a figure.
MARKS = 8
#: Names of a logged learning rate begin with one of these.
RATES = ("lr-", "lr/", "lr", "learning_rate")


def number(value: float) -> float | str | None:
    """Return a number for JSON, which knows neither NaN (None) nor infinity (a word)."""
    if math.isnan(value):
        return None
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def series(curve: Curve, name: str, run: int, most: int, **look: Any) -> dict[str, Any]:
    """Return a curve for the script: names, steps, values, and how many readings they stand for."""
    few = decimated(curve, most)
    x, y = few.steps, [number(value) for value in few.values]
    return {"name": name, "run": run, "x": x, "y": y, "of": len(curve.steps), **look}


def points_of_a_curve(runs: Sequence[JudgedRun]) -> int:
    """Return how many points a curve may have, so that the page stays small."""
    curves = sum(sum(is_single(key) for key in run.logged.curves) + 4 for run in runs)
    return max(LEAST, min(MOST, POINTS // max(curves, 1)))


def is_single(key: str) -> bool:
    """Return whether a key is no layer's."""
    return not key.startswith(PREFIX) or is_global(key)


def figures(runs: Sequence[JudgedRun]) -> list[dict[str, Any]]:
    """Return the figures over time that the logs have data for: Courant number, loss, exponent, rates."""
    most = points_of_a_curve(runs)
    drawn = [
        _figure("courant", "Courant number", _courant(runs, most), edge=1.0, rule="courant",
                about="Thick: means over batches. Above the edge the linearised update amplifies."),
        _figure("loss", "Training loss", _loss(runs, most), rule="loss",
                about="Thin: as logged. Thick: median around each step."),
        _figure("exponent", "Sharp-mode exponent, nats per step", _exponent(runs, most), edge=0.0, rule="zero",
                about="Above 0 a perturbation along the sharp mode grows. Thin: its one-sided 90 % bounds."),
        _figure("rates", "Learning rate and the largest stable one", _rates(runs, most), rule="positive",
                about="Where the rate crosses the largest stable one, the Courant number is 1."),
    ]  # fmt: skip
    marks = [_mark(event, number, run) for number, run in enumerate(runs) for event in run.events if event.marked]
    return [figure | {"marks": marks[:MARKS]} for figure in drawn if figure["series"]]


def quantities(runs: Sequence[JudgedRun]) -> list[dict[str, Any]]:
    """Return every logged number that is no layer's as a figure of its own, to choose from."""
    most, keys = points_of_a_curve(runs), keys_of_a_run()
    names = dict.fromkeys(key for run in runs for key in run.logged.curves if is_single(key) and key != SOURCE)
    chosen = []
    for name in sorted(names, key=lambda name: (not name.startswith(PREFIX), name)):
        about = keys.get(name.removeprefix(PREFIX))
        lines = [
            series(run.logged.curves[name], run.name, i, most) for i, run in enumerate(runs)
            if name in run.logged.curves
        ]  # fmt: skip
        edge = None if about is None or about.threshold == math.inf else about.threshold
        unit = f", {about.unit}" if about is not None and about.unit else ""
        chosen.append(_figure(name, name + unit, lines, edge=edge, about="" if about is None else about.meaning))
    return chosen


def _figure(
    name: str, title: str, lines: Iterable[dict[str, Any]], *, edge: float | None = None, rule: str = "free",
    about: str = "",
) -> dict[str, Any]:  # fmt: skip
    return {"id": name, "title": title, "series": list(lines), "edge": edge, "rule": rule, "about": about}


def _mark(event: Event, number: int, run: JudgedRun) -> dict[str, Any]:
    return {"step": event.step, "name": event.name, "run": number, "of": run.name}


def _named(name: str, run: JudgedRun, runs: Sequence[JudgedRun]) -> str:
    return name if len(runs) == 1 else f"{run.name}: {name}"


def _courant(runs: Sequence[JudgedRun], most: int) -> Iterable[dict[str, Any]]:
    errors = {PREFIX + name for name, key in keys_of_a_run().items() if key.error_of} | {SOURCE}
    for i, run in enumerate(runs):
        history = run.logged.history
        courant = history.get(COURANT, Curve())
        if readings(courant):
            of = smoothing_window(len(courant.steps), AVERAGE)
            yield series(averaged(courant, of), _named(f"mean of {of}", run, runs), i, most, look="thick")
            yield series(courant, _named("Courant number", run, runs), i, most, look="thin")
        others = [key for key in history if key.startswith(f"{COURANT}_") and key not in errors]
        hidden = courant_source(history) if readings(courant) else None
        others = [key for key in others if key != hidden and readings(history[key])]
        for j, key in enumerate(others if len(runs) == 1 or not readings(courant) else []):
            of = smoothing_window(len(history[key].steps), 1)
            name = key.removeprefix(PREFIX) + f" (mean of {of})" * (of > 1)
            yield series(averaged(history[key], of), _named(name, run, runs), i, most, look="line", colour=j + 1)


def _loss(runs: Sequence[JudgedRun], most: int) -> Iterable[dict[str, Any]]:
    for i, run in enumerate(runs):
        if run.loss is None:
            continue
        loss = run.logged.curves[run.loss]
        stride = stride_of(loss)
        window = smoothing_window(len(loss.steps), max(1, SMOOTHING // stride))
        name = f"median of {max(SMOOTHING, window * stride):,} steps"
        with np.errstate(invalid="ignore"):
            median = Curve(loss.steps, centred_median(np.asarray(loss.values), window).tolist())
        yield series(median, _named(name, run, runs), i, most, look="thick")
        yield series(loss, _named(run.loss, run, runs), i, most, look="thin")


def _exponent(runs: Sequence[JudgedRun], most: int) -> Iterable[dict[str, Any]]:
    for i, run in enumerate(runs):
        history = run.logged.history
        curve = history.get("stability/lyapunov", Curve())
        if not readings(curve):
            continue
        for side in ("lower", "upper"):
            bound = history.get(f"stability/lyapunov_{side}", Curve())
            if readings(bound):
                yield series(
                    bound, _named(f"{side} bound", run, runs), i, most, look="bound", colour=2 if i == 0 else i
                )
        yield series(curve, _named("exponent", run, runs), i, most, look="thick", colour=2 if i == 0 else i)


def _rates(runs: Sequence[JudgedRun], most: int) -> Iterable[dict[str, Any]]:
    for i, run in enumerate(runs):
        history, curves = run.logged.history, run.logged.curves
        limit = next((history[k] for k in ("stability/mean_square_lr", "stability/critical_lr") if k in history), None)
        if limit is None or not readings(limit):
            continue
        rates = {key: curve for key, curve in curves.items() if key.startswith(RATES) and "momentum" not in key}
        for key, curve in rates.items():
            yield series(curve, _named(key, run, runs), i, most, look="line")
        if not rates and history.get(MEAN_SQUARE, Curve()).steps == limit.steps:
            rate = [c * edge for c, edge in zip(history[MEAN_SQUARE].values, limit.values)]
            yield series(Curve(limit.steps, rate), _named("rate (Courant number times the limit)", run, runs), i, most,
                         look="line")  # fmt: skip
        look = {"look": "dashed", "colour": 4} if len(runs) == 1 else {"look": "thin"}
        yield series(limit, _named("largest stable rate", run, runs), i, most, **look)
        if "stability/lr_cap" in history:
            yield series(history["stability/lr_cap"], _named("cap of the rate", run, runs), i, most, look="thin")
