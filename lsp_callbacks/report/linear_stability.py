"""Linear stability of a run, from its readings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.report.curves import AVERAGE, averaged, latest, readings

#: Divisor of a learning rate that is told: beyond it the weights have exploded, and their critical rate guides nobody.
LARGEST = 1e4
#: Range of mean Courant numbers "at the edge": healthy full-batch training reaches 1.19 by its curvature, and healthy
#: training with small batches 2.0 by the exponent of SGD and 3.0 by its second moment (see ``benchmarks/``).
EDGE, STOCHASTIC = (0.9, 1.2), {"courant_mean_square": (0.9, 3.0), "courant_sgd": (0.9, 2.0)}

Linear = Literal["stable", "recovered", "edge", "unstable", "collapsed", "contradictory", "unknown"]


@dataclass(frozen=True)
class LinearState:
    """Whether the linearised update amplifies, at the last readings.

    Attributes:
        state: see `Verdict`.
        cause: likewise.
        evidence: likewise.
        advice: likewise.
        slower: advice that brings the rate below the edge; empty where that is not known.
    """

    state: Linear
    cause: str
    evidence: dict[str, Any]
    advice: str = ""
    slower: str = ""


def linear_state(history: Mapping[str, Curve]) -> LinearState:
    """Return the linear stability of a run, from the stochastic Courant number if measured, else from the exponent.

    The mean of 5 Courant numbers decides, and no positive exponent may stand beside it. By the exponent alone, a run is
    stable if its upper bound is not positive, unstable if its value is (not its lower bound: windows scatter most when
    a run begins to fail), and the Courant number of one batch separates the edge, where healthy training may stay, from
    instability. NaN is never stable, nor is a collapsed network. "Since" counts back over measurements without a break.
    Where the bounds of the exponent and the Courant number lie on opposite sides of their edges, they contradict each
    other.
    """
    exponent, courants = (history.get(f"stability/{key}", Curve()) for key in ("lyapunov", "courant"))
    name = "courant"
    if not readings(courants) and readings(history.get("stability/courant_gd")):  # the probes were never complete
        name, courants = "courant_gd", history["stability/courant_gd"]
    x, courant = latest(exponent), latest(averaged(courants))
    lower, upper = (latest(history.get(f"stability/lyapunov_{side}")) for side in ("lower", "upper"))
    if math.isnan(x) and math.isnan(courant):
        return _not_measured(history, max(len(exponent.values), len(courants.values)))
    evidence = {
        "courant": courant, "courant_readings": min(len(readings(courants)), AVERAGE), "exponent": x, "lower": lower,
        "upper": upper, "courant_of": name, "players": _players(history),
    }  # fmt: skip
    evidence = {name: v for name, v in evidence.items() if v is not None and not (isinstance(v, float) and v != v)}
    collapsed = history.get("stability/collapsed", Curve())
    if (collapsed_since := unbroken(collapsed, 0.5)) is not None:
        return LinearState(
            "collapsed", "collapse", evidence | {"since": collapsed_since}, "start again with a lower learning rate"
        )
    edges = [edge for key, edge in STOCHASTIC.items() if not math.isnan(latest(history.get(f"stability/{key}")))]
    stochastic, near = bool(edges), edges[0] if edges else EDGE
    by_courant = stochastic or math.isnan(x)
    deciding, edge = (averaged(courants), near[1]) if by_courant else (exponent, 0.0)
    cause = "courant" if by_courant else "exponent"
    since = unbroken(deciding, edge)
    evidence["step"] = max(
        step for curve in (exponent, courants) for step, v in zip(curve.steps, curve.values) if not math.isnan(v)
    )
    # A quantity whose last value is NaN and one that never succeeded are both unknown.
    failed = max((_trailing_nans(curve) for curve in (exponent, courants)), key=len)
    if failed:
        evidence |= {"failed_since": failed[0], "failed": len(failed)}
    slower = ""
    if courant > near[0]:
        evidence["divide_by"] = by = max(courant / 0.8, 1.2)
        slower = f"divide the learning rate by {by:{'.2g' if by < 100 else ',.0f'}}"
        if by > LARGEST:
            slower = "start again with a much lower learning rate"
    ask = slower or "halve the learning rate"

    if contradict(courant, x, lower, upper, near):
        return LinearState("contradictory", "contradiction", evidence | {"contradictory": True})
    if since is not None and not near[0] <= courant <= near[1]:
        return LinearState("unstable", cause, evidence | {"since": since}, ask, ask)
    if failed:
        return LinearState("unknown", "failed", evidence, "look for the warning that names the reason", slower)
    may_grow = x > 0 or (upper > 0 and not by_courant)  # bounds on both sides of 0 take nothing from a Courant number
    if since is not None or may_grow or courant >= near[0]:
        return LinearState("edge", cause, evidence, f"healthy as long as the loss falls, otherwise {ask}", ask)
    beyond = [step for step, v in zip(deciding.steps, deciding.values) if v > edge]
    if beyond:
        evidence |= {"beyond_from": beyond[0], "beyond_to": beyond[-1]}
        return LinearState("recovered", "readings", evidence, "check that the loss has recovered")
    return LinearState("stable", cause, evidence, "nothing to do")


def contradict(courant: float, x: float, lower: float, upper: float, near: tuple[float, float]) -> bool:
    """Return whether Courant number and exponent of the real step are on opposite sides of the edge.

    Example:
        >>> nan = float("nan")
        >>> [contradict(c, x, nan, nan, (0.9, 2.0)) for c, x in ((0.1, 0.2), (25.0, -0.1), (1.5, 0.2), (0.1, -0.2))]
        [True, True, False, False]
    """
    grows = (x if math.isnan(lower) else lower) > 0
    shrinks = (x if math.isnan(upper) else upper) < 0
    return (grows and courant < near[0]) or (shrinks and courant > near[1])


def _not_measured(history: Mapping[str, Curve], tried: int) -> LinearState:
    if tried:
        evidence = {"failed": tried}
        return LinearState("unknown", "failed", evidence, "look for the warning that names the reason")
    if not history:
        return LinearState("unknown", "not measured", {}, "train longer, or measure more often")
    kinds = ("spectral_norm_max", "residual_gain_max")
    measured = {name: value for name in kinds if not math.isnan(value := latest(history.get(f"stability/{name}")))}
    advice = "if you did not choose that, the warning at the start of training says why"
    return LinearState("unknown", "not measured", measured | {"others": True, "players": _players(history)}, advice)


def _players(history: Mapping[str, Curve]) -> str | None:
    """Return the exponent of all players together, which their Courant numbers leave out; None with one player."""
    if not any(key.startswith("stability/player_courant/") for key in history):
        return None
    exponent = latest(history.get("stability/lyapunov_trajectory"))
    return "" if math.isnan(exponent) else f" (exponent {exponent:+.2g} a step)"


def _trailing_nans(curve: Curve) -> list[int]:
    """Return the steps of the measurements that failed since the last one that did not."""
    begin = max((i + 1 for i, value in enumerate(curve.values) if not math.isnan(value)), default=0)
    return curve.steps[begin:]


def unbroken(curve: Curve, edge: float) -> int | None:
    """Return the first step of the readings that are above the edge without a break up to the last one."""
    since = None
    for step, value in zip(reversed(curve.steps), reversed(curve.values)):
        if value <= edge:
            break
        since = since if math.isnan(value) else step
    return since
