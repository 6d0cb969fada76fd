"""How a run went, as data: the state, what decides it, the numbers behind it, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.monitor.losses import SETTLED, LossRecord
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.nan_finder import unrecovered_fault_of
from lsp_callbacks.report.linear_stability import linear_state, unbroken

State = Literal[
    "not finite", "collapsed", "unstable", "risen", "not learning", "contradictory", "unknown", "edge", "recovered",
    "stable",
]  # fmt: skip
#: What to do about a fault, by where it was.
REMEDIES = {
    "forward": "keep that operation's input in its domain (clamp, eps, a mask before it), or compute it in float32",
    "backward": "keep that operation's input from where its derivative is infinite, by a clamp or a mask before it",
    "batch": "look at the data, or leave out what is not finite",
    "weights": "the update before made it: lower the learning rate, or clip the gradient",
    "unknown": "try torch.autograd.set_detect_anomaly(True)",
}
#: A reading that is older than this share of the run, and than so many steps, does not speak of its end.
OLD, FEW = 0.5, 50
#: Readings that a run should have, where more are asked for.
WANTED = 20


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        history: of the `StabilityMonitor`.
        fault: that ended it in NaN or Inf, if one did.
        step: the last step; None where only the history is known: then nothing is said of its age, nor of the loss.
        losses: what the loss did; None where nobody saw it.
        event: step of the event of `StopOnInstability`.
        stop: step of its stop.
        reason: of the stop.
    """

    history: Mapping[str, Curve]
    fault: Fault | None = None
    step: int | None = None
    losses: LossRecord | None = None
    event: int | None = None
    stop: int | None = None
    reason: str | None = None

    @classmethod
    def of(cls, monitor: Monitor, step: int, stops: Sequence[Any] = ()) -> Run:
        """What a `Monitor` and those who judge its observations know after the steps before ``step``."""
        events = [each.event_step for each in stops if each.event_step is not None]
        stopped = next((each for each in stops if each.stop_step is not None), None)
        told = {} if stopped is None else {"stop": stopped.stop_step, "reason": stopped.reason}
        return cls(
            monitor.history,
            unrecovered_fault_of(monitor),
            max(step - 1, 0),
            monitor.losses,
            min(events, default=None),
            **told,
        )


@dataclass(frozen=True)
class Verdict:
    """How a run went when it ended; `report.sentence` says it in words.

    Attributes:
        state: by falling gravity, the first that holds:

            - "not finite": the last loss was not, or a `Fault` ended the run;
            - "collapsed": the outputs have ceased to depend on the inputs;
            - "unstable": the readings say so, or `StopOnInstability` has stopped it, or its loss rose at the edge;
            - "risen": the loss has risen well above its least value, and no reading says why;
            - "not learning": the loss has never fallen;
            - "contradictory": the Courant number and the exponent of the real step say opposite things;
            - "unknown": nothing was measured, the last measurements failed, the last reading is old, or in the last one
              the outputs did not depend on the inputs, and it takes more to say that it has collapsed;
            - "edge": at the edge of stability, where healthy training may live;
            - "recovered": stable at the end, but not always, or after an event;
            - "stable".
        cause: what decides: "fault", "loss", "collapse", "courant", "exponent", "stop", "contradiction", "age",
            "failed", "not measured", "event", "readings".
        evidence: the numbers (and the texts of a fault or a stop) that it rests on: ``step``, ``age`` of the last
            reading, ``courant`` (a mean of ``courant_readings``), ``exponent`` with ``lower`` and ``upper``, ``since``,
            ``loss_first``, ``loss_least``, ``loss_smoothed``, ``loss_last``, ``event``, ``stop``, ``divide_by`` ...
        advice: what to do; empty where nothing can be said.
    """

    state: State
    cause: str
    evidence: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    advice: str = ""

    @property
    def calm(self) -> bool:
        """Whether there is nothing to worry about: stable, and measured of late."""
        return self.state == "stable"


def judge(run: Run) -> Verdict:
    """The gravest thing that is known of a run; unknown where too little is."""
    linear = linear_state(run.history)
    evidence = dict(linear.evidence) | _of_the_run(run)
    told = Verdict(linear.state, linear.cause, MappingProxyType(evidence), linear.advice)
    lower = linear.slower or "lower the learning rate, or warm it up for longer"
    losses = run.losses
    if run.fault is not None:
        return replace(told, state="not finite", cause="fault", advice=REMEDIES[run.fault.where])
    if losses is not None and not losses.finite:
        return replace(told, state="not finite", cause="loss", advice=f"{lower}; 'numerics' names the operation")
    if told.state == "collapsed":
        return told
    alike = unbroken(run.history.get("stability/collapsed", Curve()), 0.0)  # not for good, as far as the readings say
    if alike is not None and losses is not None and (losses.risen or losses.fallen is False):
        told = replace(told, evidence=MappingProxyType(evidence | {"since": alike}))
        return replace(told, state="collapsed", cause="collapse", advice="start again with a lower learning rate")
    if run.stop is not None:
        return replace(told, state="unstable", cause="stop", advice=lower)
    if losses is not None and losses.risen:
        if told.state == "unstable":
            return told
        if told.state == "edge":
            return replace(told, state="unstable", cause="loss", advice=lower)
        return replace(told, state="risen", cause="loss", advice=_more(run, "to see whether the learning rate is why"))
    if losses is not None and losses.fallen is False:
        return replace(told, state="not learning", cause="loss", advice=_not_learning(told, lower))
    age = evidence.get("age", 0)
    if told.state != "unknown" and run.step is not None and age > max(FEW, OLD * run.step):
        return replace(told, state="unknown", cause="age", advice=_more(run))
    if told.state == "contradictory":
        return told
    if alike is not None and told.state not in ("unstable", "unknown"):
        told = replace(told, state="unknown", cause="collapse", evidence=MappingProxyType(evidence | {"since": alike}))
        return replace(told, advice=_more(run, "to see whether the network has collapsed"))
    if told.state == "stable" and run.event is not None:
        return replace(told, state="recovered", cause="event", advice="see that the loss has recovered")
    if told.state == "stable" and run.step is not None:
        return replace(told, advice=_at_rest(losses))
    return told


def _of_the_run(run: Run) -> dict[str, Any]:
    """Evidence beside the readings."""
    told: dict[str, Any] = {
        "last_step": run.step, "event": run.event, "stop": run.stop, "reason": run.reason,
        "fault": None if run.fault is None else str(run.fault),
        "fault_step": None if run.fault is None else run.fault.step,
    }  # fmt: skip
    steps = [
        step for key in ("courant", "courant_gd", "lyapunov") for step in _read(run.history.get(f"stability/{key}"))
    ]
    if run.step is not None and steps:
        told["age"] = run.step - max(steps)
    losses = run.losses
    if losses is not None and losses.last_step >= 0:
        told |= {
            "loss_first": losses.first, "loss_least": losses.least, "loss_smoothed": losses.smoothed,
            "loss_last": losses.last, "losses": losses.count, "loss_nonfinite_step": losses.nonfinite_step,
            "loss_did": _did(losses),
        }  # fmt: skip
    elif run.step is not None:
        told["loss_did"] = "not seen"
    return {name: value for name, value in told.items() if value is not None}


def _read(curve: Curve | None) -> list[int]:
    """Steps of the readings that are numbers."""
    return [] if curve is None else [step for step, v in zip(curve.steps, curve.values) if not math.isnan(v)]


def _did(losses: LossRecord) -> str:
    """What the loss did, in a word or two."""
    if not losses.finite:
        return "not finite"
    if not losses.comparable:
        return "several"
    if losses.risen:
        return "risen"
    if losses.fallen is None:
        return "too short"
    return "fallen" if losses.fallen else "not fallen"


def _not_learning(told: Verdict, lower: str) -> str:
    if told.state == "contradictory":
        return ""
    if told.state in ("unstable", "edge"):
        return lower
    return "the learning rate may be too high or too low: compare it with a tenth of it, or look at data and loss"


def _more(run: Run, why: str = "") -> str:
    """How to measure more."""
    every = "" if run.step is None else f" (every_n_steps={max(1, (run.step + 1) // WANTED)}, or a larger budget)"
    return f"measure more often{every}{' ' * bool(why)}{why}"


def _at_rest(losses: LossRecord | None) -> str:
    """Of a run that the readings call stable."""
    if losses is None or losses.last_step < 0:
        return "see that the loss falls: nobody has told it"
    if losses.nonfinite_step is not None:
        return "see that the loss has recovered"
    if not losses.comparable:
        return "the sum of several losses does not tell whether they fall"
    if losses.fallen is None:
        return f"see that the loss falls: {SETTLED} steps are too few to tell"
    return "nothing to do"
