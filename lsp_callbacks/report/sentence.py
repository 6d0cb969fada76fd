"""Verdict in words: the state of a run, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.report.judgement import Run, Verdict, judge


def verdict(history: Mapping[str, Curve], fault: Fault | None = None) -> str:
    """Return how stable the training was at its end, why, and what to do, by its readings alone.

    It is about *linear* stability: whether the linearised update amplifies, see `linear_state`. Where several players
    take turns, it is about each of them separately, and says so. `judge` also uses the loss and the readings' age.

    Args:
        history: of the `StabilityMonitor`.
        fault: that ended the run in NaN or Inf, if one did: it is named first.

    Example:
        >>> from lsp_callbacks import Curve
        >>> steps = [0, 50, 100]
        >>> courant = Curve(steps, [0.2, 0.3, 0.4])
        >>> print(verdict({"stability/courant": courant, "stability/lyapunov": Curve(steps, [-0.3, -0.25, -0.2])}))
        lsp_callbacks: stable at step 100 (linear stability): the Courant number is 0.3 (mean of 3, the edge is at 1)
        and the sharp mode shrinks by e in 5 steps (exponent -0.2); nothing to do.
        >>> courant = Curve(steps, [0.8, 2.0, 3.8])
        >>> print(verdict({"stability/courant": courant, "stability/lyapunov": Curve(steps, [-0.2, 0.1, 0.25])}))
        lsp_callbacks: unstable since step 50 (linear stability): the Courant number is 2.2 (mean of 3, the edge is at
        1) and the sharp mode grows by e in 4 steps (exponent +0.25); divide the learning rate by 2.7.
        >>> print(verdict({}))
        lsp_callbacks: stability was not measured: no measurement was completed; train longer, or measure more often.
    """
    return sentence(judge(Run(history, fault)))


def sentence(verdict: Verdict) -> str:
    """Return one sentence, from the verdict's own data.

    Example:
        >>> print(sentence(Verdict("not learning", "loss", {"loss_first": 2.3, "loss_smoothed": 2.4, "losses": 600})))
        lsp_callbacks: the loss has not fallen: 2.3 at first, 2.4 now (smoothed); no advice.
    """
    evidence = dict(verdict.evidence)
    parts = [_opening(verdict, evidence), _events(verdict, evidence), _loss(verdict, evidence), verdict.advice]
    if not verdict.advice:
        parts.append("no advice")
    text = "; ".join(filter(None, parts))
    return f"lsp_callbacks: {text}{_players(evidence)}."


def _opening(verdict: Verdict, evidence: Mapping[str, Any]) -> str:
    numbers = _numbers(evidence)
    step, since = evidence.get("step"), evidence.get("since")
    linear, said = "(linear stability)", f": {numbers}" * bool(numbers)
    against = ", which contradict each other" * evidence.get("contradictory", False)
    stability = f"stability at step {step}: {numbers}{against}" if numbers else ""
    match verdict.state, verdict.cause:
        case "not finite", "fault":
            at = f"not finite since step {evidence['fault_step']}: {evidence['fault']}"
            return "; ".join(filter(None, (at, stability)))
        case "not finite", _:
            at = f"not finite since step {evidence['loss_nonfinite_step']}: the loss is {evidence['loss_last']:g}"
            return "; ".join(filter(None, (at, stability)))
        case "collapsed", _:
            return (
                f"collapsed since step {since}: the outputs no longer depend on the inputs, and nothing can "
                "become unstable any more"
            )
        case "unstable", "stop":
            return f"unstable, and stopped at step {evidence['stop']}: {evidence['reason']}"
        case "unstable", "loss":
            return f"unstable: the loss rises at the edge of stability{said}"
        case "unstable", _:
            failed = evidence.get("failed_since")
            after = "" if failed is None else f"; from step {failed} on, measurements failed (NaN)"
            return f"unstable since step {since} {linear}{said}{after}"
        case "risen", _:
            return "; ".join(filter(None, (_risen(evidence), stability)))
        case "not learning", _:
            return "; ".join(filter(None, (_not_fallen(evidence), stability)))
        case "contradictory", _:
            return f"the readings at step {step} contradict each other {linear}{said}"
        case "unknown", "failed":
            return _failed(evidence, numbers)
        case "unknown", "collapse":
            return f"stability is unknown since step {since}: the outputs did not depend on the inputs"
        case "unknown", "age":
            age = f"the last reading is {evidence['age']:,} steps old"
            return f"stability is unknown since step {step}: {age} ({numbers}{against})"
        case "unknown", "noise":
            return "; ".join(filter(None, (_unclear(evidence), stability)))
        case "unknown", "flat":
            return (
                f"stability is unknown since step {step}: the loss has no curvature in the outputs there, as where a "
                f"softmax is saturated ({numbers})"
            )
        case "unknown", "rate":
            scheduled = evidence.get("scheduled", 0.0)
            why = f"the learning rate has grown: at today's the Courant number is {scheduled:.2g}"
            why = why if scheduled else "a Courant number of 0 says nothing of larger rates"
            return f"stability is unknown since step {step}: {why} ({numbers})"
        case "unknown", _:
            return _not_measured(evidence)
        case "edge", _:
            return f"at the edge of stability at step {step} {linear}{said}"
        case "recovered", "readings":
            between = f"but not always between steps {evidence['beyond_from']} and {evidence['beyond_to']}"
            return f"stable at step {step} {linear}, {between}{said}"
        case "recovered", _:
            return f"stable at step {step} {linear}, after an event{said}"
    return f"stable at step {step} {linear}{said}"


def _events(verdict: Verdict, evidence: Mapping[str, Any]) -> str:
    event, stop = evidence.get("event"), evidence.get("stop")
    texts = [] if event is None else [f"event at step {event}"]
    if stop is not None and verdict.cause != "stop":
        texts.append(f"stopped at step {stop}")
    return ", ".join(texts)


def _loss(verdict: Verdict, evidence: Mapping[str, Any]) -> str:
    """Return what the loss did, where the opening does not say it."""
    did = evidence.get("loss_did")
    if verdict.cause == "stop" and did != "fallen":
        return ""  # the reason says it
    if did == "risen" and verdict.state != "risen":
        return _risen(evidence)
    if did == "not fallen" and verdict.state != "not learning":
        return _not_fallen(evidence)
    if did == "unclear" and verdict.cause != "noise":
        return _unclear(evidence)
    if did == "fallen":
        lost = evidence.get("loss_nonfinite_step")
        broken = "" if lost is None else f", and was not finite at step {lost}"
        return f"the loss fell from {evidence['loss_first']:.3g} to {evidence['loss_smoothed']:.3g}{broken}"
    return "the loss was not seen" if did == "not seen" else ""


def _risen(evidence: Mapping[str, Any]) -> str:
    return f"the smoothed loss rose from {evidence['loss_least']:.3g} to {evidence['loss_smoothed']:.3g}"


def _unclear(evidence: Mapping[str, Any]) -> str:
    now, least, noise = evidence["loss_smoothed"], evidence["loss_least"], evidence["loss_noise"]
    return (
        f"whether the loss falls is unknown: smoothed, it is {now:.3g} now and was {least:.3g} at its least, but that "
        f"of a single step scatters by {noise:.2g}"
    )


def _not_fallen(evidence: Mapping[str, Any]) -> str:
    first, now = evidence["loss_first"], evidence["loss_smoothed"]
    return f"the loss has not fallen: {first:.3g} at first, {now:.3g} now (smoothed)"


def _failed(evidence: Mapping[str, Any], numbers: str) -> str:
    failed = evidence["failed"]
    count = f"{failed} measurements" if failed > 1 else "measurement"
    if "failed_since" not in evidence:
        return f"stability was not measured: {count} failed (NaN)"
    return (
        f"stability is unknown since step {evidence['failed_since']}: the last {count} failed (NaN); before "
        f"that, {numbers}"
    )


def _not_measured(evidence: Mapping[str, Any]) -> str:
    if not evidence.get("others"):
        return "stability was not measured: no measurement was completed"
    kinds = {
        "spectral_norm_max": "the largest spectral norm of a layer is {:.3g}",
        "residual_gain_max": "the largest gain of a residual block is {:+.2g} (above 0 it expands)",
    }
    others = [text.format(evidence[name]) for name, text in kinds.items() if name in evidence]
    return "the stability of the optimizer's steps was not measured (no Courant number, no exponent)" + (
        f"; {' and '.join(others)}, which does not show whether the learning rate is too large" if others else ""
    )


def _players(evidence: Mapping[str, Any]) -> str:
    players = evidence.get("players")
    if players is None:
        return ""
    return f". This is each player by itself; lyapunov_trajectory measures how they drive each other{players}"


def _numbers(evidence: Mapping[str, Any]) -> str:
    return " and ".join(filter(None, (_courant(evidence), _exponent(evidence))))


def _courant(evidence: Mapping[str, Any]) -> str:
    of = evidence.get("courant_readings", 1)
    if "courant" not in evidence:
        return ""
    name = "the Courant number" + " of one batch's curvature" * (evidence.get("courant_of") == "courant_gd")
    return f"{name} is {evidence['courant']:.2g} ({f'mean of {of}, ' if of > 1 else ''}the edge is at 1)"


def _exponent(evidence: Mapping[str, Any]) -> str:
    x, lower, upper = (evidence.get(name, math.nan) for name in ("exponent", "lower", "upper"))
    bounds = "" if math.isnan(upper - lower) else f", 90 % bounds {lower:+.2g} and {upper:+.2g}"
    return "" if math.isnan(x) else f"the sharp mode {e_folding(x)} (exponent {x:+.2g}{bounds})"


def e_folding(exponent: float) -> str:
    """Return an exponent in words.

    Example:
        >>> e_folding(0.25), e_folding(-0.001), e_folding(0.0)
        ('grows by e in 4 steps', 'shrinks by e in 1,000 steps', 'keeps its size')
    """
    if abs(exponent) < 1e-6:
        return "keeps its size"
    steps = 1 / abs(exponent)
    return f"{'grows' if exponent > 0 else 'shrinks'} by e in {steps:{',.0f' if steps >= 10 else '.2g'}} steps"
