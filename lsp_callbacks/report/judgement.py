"""Verdict on a run, as data: its state, what decides it, the numbers behind it, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.courant_source import PREFERENCE
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.monitor.losses import SETTLED, LossRecord
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.nan_finder import unrecovered_fault_of
from lsp_callbacks.report.curves import latest
from lsp_callbacks.report.linear_stability import EDGE, linear_state, unbroken

State = Literal[
    "not finite", "collapsed", "unstable", "risen", "not learning", "contradictory", "unknown", "edge", "recovered",
    "stable",
]  # fmt: skip
#: Advice on a fault, by where it was.
REMEDIES = {
    "forward": "keep that operation's input in its domain (clamp, eps, a mask before it), or compute it in float32",
    "backward": "keep that operation's input away from infinite derivatives (clamp, or a mask before it)",
    "batch": "check the data, or remove samples that are not finite",
    "weights": "the update before produced it: lower the learning rate, or clip the gradient",
    "unknown": "try torch.autograd.set_detect_anomaly(True)",
}
#: Advice where a loss is not finite, of which no fault is known.
NAMES = "'numerics' names the operation"
SUDDEN = f"nothing before shows instability: look for a sample or an operation that is not finite; {NAMES}"
#: Further advice where the loss alone ended a run whose readings are stable.
MOVES = "but no reading shows it: where the target itself moves, a loss that rises is no instability (confirm=None)"
#: Advice where the noise of the loss hides what it does.
NOISY = "train for longer, or look at the loss of more samples, to see whether it falls"
#: A reading that is older than this share of the run, and than so many steps, does not describe its end.
OLD, FEW = 0.5, 50
#: Growth of the learning rate since the readings that they do not answer for, once it brings it to the edge.
GREW = 2.0
#: The numbers that tell the stability of the optimizer's steps.
DECIDING = frozenset((*PREFERENCE, "stability/lyapunov"))
#: Number of readings in a run that the advice to measure more often aims at.
WANTED = 20


@dataclass(frozen=True)
class Run:
    """Facts about a run that a verdict rests on.

    Attributes:
        history: of the `StabilityMonitor`.
        fault: that ended it in NaN or Inf, if one did.
        step: the last step; None where only the history is known: then neither age nor loss are part of the verdict.
        losses: record of the loss; None where it was not seen.
        event: step of the event of `StopOnInstability`.
        stop: step of its stop.
        reason: of the stop.
        scheduled: the Courant number of today's learning rate, by the last critical ones; NaN where it is not known.
        waiting: quantities that tell the stability of the steps, and that the budget has not paid for yet.
    """

    history: Mapping[str, Curve]
    fault: Fault | None = None
    step: int | None = None
    losses: LossRecord | None = None
    event: int | None = None
    stop: int | None = None
    reason: str | None = None
    scheduled: float = math.nan
    waiting: Sequence[str] = ()

    @classmethod
    def of(cls, monitor: Monitor, step: int, stops: Sequence[Any] = (), *, scheduled: float = math.nan) -> Run:
        """Return the facts after the steps before ``step``, from a `Monitor` and the callbacks that judge it."""
        events = [judge.event_step for judge in stops if judge.event_step is not None]
        stopped = next((judge for judge in stops if judge.stop_step is not None), None)
        monitor.losses.settle()
        unpaid = monitor.cadence.waiting()
        stop = {} if stopped is None else {"stop": stopped.stop_step, "reason": stopped.reason}
        return cls(
            monitor.history,
            unrecovered_fault_of(monitor),
            max(step - 1, 0),
            monitor.losses,
            min(events, default=None),
            scheduled=scheduled,
            waiting=[
                name
                for name, quantity in monitor.quantities.items()
                if name in unpaid and DECIDING.intersection(quantity.keys)
            ],
            **stop,
        )


@dataclass(frozen=True)
class Verdict:
    """State of a run at its end; `report.sentence` puts it into words.

    Attributes:
        state: the first of these that holds, the most severe first:

            - "not finite": the last loss was not, or a `Fault` ended the run;
            - "collapsed": the outputs no longer depend on the inputs;
            - "unstable": by its readings, or `StopOnInstability` has stopped it, or its loss rose at the edge;
            - "risen": the loss has risen well above its least value, by more than its noise, and no reading explains
              it;
            - "not learning": the loss has never fallen;
            - "contradictory": the Courant number and the exponent of the real step contradict each other;
            - "unknown": nothing was measured, the last measurements failed, the last reading is old, or of a learning
              rate of 0 or one that has grown far since, or found no curvature at all where the loss has not fallen, or
              in the last one the outputs did not depend on the inputs,
              for too few readings to call it collapsed, or the loss is too noisy to tell whether it falls;
            - "edge": at the edge of stability, where healthy training may stay;
            - "recovered": stable at the end, but not always, or after an event;
            - "stable".
        cause: what decided: "fault", "loss", "collapse", "courant", "exponent", "stop", "contradiction", "age",
            "rate", "flat", "failed", "not measured", "event", "readings", "noise".
        evidence: numbers (and the texts of a fault or a stop) that it rests on: ``step``, ``age`` of the last
            reading, ``courant`` (a mean of ``courant_readings``), ``exponent`` with ``lower`` and ``upper``, ``since``,
            ``loss_first``, ``loss_least``, ``loss_smoothed``, ``loss_last``, ``loss_noise`` (the standard deviation of
            a single step's loss), ``event``, ``stop``, ``divide_by`` ...
        advice: what to do; empty without advice.
    """

    state: State
    cause: str
    evidence: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    advice: str = ""

    @property
    def calm(self) -> bool:
        """Whether there is nothing to worry about: stable, and measured recently."""
        return self.state == "stable"


def judge(run: Run) -> Verdict:
    """Return the most severe state that the facts of a run show; "unknown" where they are too few."""
    linear = linear_state(run.history)
    evidence = dict(linear.evidence) | _of_the_run(run)
    verdict = Verdict(linear.state, linear.cause, MappingProxyType(evidence), linear.advice)
    lower = linear.slower or "lower the learning rate, or warm it up for longer"
    losses = run.losses
    if run.fault is not None:
        return replace(verdict, state="not finite", cause="fault", advice=REMEDIES[run.fault.where])
    if losses is not None and not losses.finite:
        advice = SUDDEN if _is_sudden(run) else f"{lower}; {NAMES}"
        return replace(verdict, state="not finite", cause="loss", advice=advice)
    if verdict.state == "collapsed":
        return verdict
    alike = unbroken(run.history.get("stability/collapsed", Curve()), 0.0)  # not for good, as far as the readings say
    if alike is not None and losses is not None and (losses.risen or losses.fallen is False):
        verdict = replace(verdict, evidence=MappingProxyType(evidence | {"since": alike}))
        return replace(verdict, state="collapsed", cause="collapse", advice="start again with a lower learning rate")
    if run.stop is not None:
        advice = f"{lower}; {MOVES}" if verdict.state == "stable" and run.event is None else lower
        return replace(verdict, state="unstable", cause="stop", advice=advice)
    if losses is not None and (losses.risen or losses.has_exploded):
        if verdict.state == "unstable":
            return verdict
        if verdict.state == "edge":
            return replace(verdict, state="unstable", cause="loss", advice=lower)
        if not (losses.has_clearly_risen or losses.has_exploded):
            return replace(verdict, state="unknown", cause="noise", advice=NOISY)
        return replace(
            verdict, state="risen", cause="loss", advice=_more(run, "to see whether the learning rate is the cause")
        )
    if losses is not None and losses.fallen is False:
        if verdict.state in ("stable", "recovered") and not losses.has_clearly_not_fallen:
            return replace(verdict, state="unknown", cause="noise", advice=NOISY)
        return replace(verdict, state="not learning", cause="loss", advice=_not_learning(verdict, lower))
    age = evidence.get("age", 0)
    if verdict.state != "unknown" and run.step is not None and age > max(FEW, OLD * run.step):
        return replace(verdict, state="unknown", cause="age", advice=_more(run))
    courant = evidence.get("courant", math.nan)
    if verdict.state in ("stable", "recovered") and is_flat(run.history) and not (losses and losses.fallen):
        return replace(verdict, state="unknown", cause="flat", advice=_more(run, "when the outputs are others"))
    if verdict.state in ("stable", "recovered") and (
        run.scheduled > max(EDGE[0], GREW * courant) or (courant == 0 and "exponent" not in evidence)
    ):
        grown = evidence | ({} if math.isnan(run.scheduled) else {"scheduled": run.scheduled})
        return replace(verdict, state="unknown", cause="rate", evidence=MappingProxyType(grown), advice=_more(run))
    if verdict.cause == "not measured" and run.waiting:
        return replace(verdict, advice=f"{_more(run)}: the budget has paid for no {' or '.join(run.waiting)} yet")
    if verdict.state == "contradictory":
        return verdict
    if alike is not None and verdict.state not in ("unstable", "unknown"):
        verdict = replace(
            verdict, state="unknown", cause="collapse", evidence=MappingProxyType(evidence | {"since": alike})
        )
        return replace(verdict, advice=_more(run, "to see whether the network has collapsed"))
    if verdict.state == "stable" and run.event is not None:
        return replace(verdict, state="recovered", cause="event", advice="check that the loss has recovered")
    if verdict.state == "stable" and run.step is not None:
        return replace(verdict, advice=_at_rest(losses))
    return verdict


def _is_sudden(run: Run) -> bool:
    """Return whether the loss ceased to be finite while it was level, and the last Courant number below the edge."""
    curve = run.history.get("stability/courant", Curve())
    steps = _read(curve)
    if run.losses is None or not run.losses.broke_off or not steps:
        return False
    value, age = curve.values[curve.steps.index(steps[-1])], run.losses.last_step - steps[-1]
    return value < EDGE[0] and age <= max(FEW, OLD * run.losses.last_step)


def is_flat(history: Mapping[str, Curve]) -> bool:
    """Return whether the last Courant number is 0 because the loss has no curvature in the outputs, at whatever rate.

    Then it comes without a critical rate, as that is infinite.
    """
    courant, rate = (_read(history.get(f"stability/{key}")) for key in ("courant", "mean_square_lr"))
    last = latest(history.get("stability/courant"))
    return last == 0 and latest(history.get("stability/courant_mean_square")) == 0 and courant[-1:] != rate[-1:]


def _of_the_run(run: Run) -> dict[str, Any]:
    """Return the evidence beside the readings."""
    evidence: dict[str, Any] = {
        "last_step": run.step, "event": run.event, "stop": run.stop, "reason": run.reason,
        "fault": None if run.fault is None else str(run.fault),
        "fault_step": None if run.fault is None else run.fault.step,
    }  # fmt: skip
    steps = [
        step for key in ("courant", "courant_gd", "lyapunov") for step in _read(run.history.get(f"stability/{key}"))
    ]
    if run.step is not None and steps:
        evidence["age"] = run.step - max(steps)
    losses = run.losses
    if losses is not None and losses.last_step >= 0:
        evidence |= {
            "loss_first": losses.first, "loss_least": losses.least, "loss_smoothed": losses.smoothed,
            "loss_last": losses.last, "loss_noise": losses.noise, "losses": losses.count,
            "loss_nonfinite_step": losses.nonfinite_step,
            "loss_did": _did(losses),
        }  # fmt: skip
    elif run.step is not None:
        evidence["loss_did"] = "not seen"
    return {name: value for name, value in evidence.items() if value is not None}


def _read(curve: Curve | None) -> list[int]:
    """Return the steps of the readings that are numbers."""
    return [] if curve is None else [step for step, v in zip(curve.steps, curve.values) if not math.isnan(v)]


def _did(losses: LossRecord) -> str:
    """Return what the loss did, in a word or two."""
    if not losses.finite:
        return "not finite"
    if not losses.comparable:
        return "several"
    if losses.has_exploded or (losses.risen and losses.has_clearly_risen):
        return "risen"
    if losses.risen or (losses.fallen is False and not losses.has_clearly_not_fallen):
        return "unclear"
    if losses.fallen is None:
        return "too short"
    return "fallen" if losses.fallen else "not fallen"


def _not_learning(verdict: Verdict, lower: str) -> str:
    if verdict.state == "contradictory":
        return ""
    if verdict.state in ("unstable", "edge"):
        return lower
    return "the learning rate may be too high or too low: compare it with a tenth of it, or look at data and loss"


def _more(run: Run, why: str = "") -> str:
    """Return the advice to measure more often."""
    every = "" if run.step is None else f" (every_n_steps={max(1, (run.step + 1) // WANTED)}, or a larger budget)"
    return f"measure more often{every}{' ' * bool(why)}{why}"


def _at_rest(losses: LossRecord | None) -> str:
    """Return the advice for a run that is stable by its readings."""
    if losses is None or losses.last_step < 0:
        return "check that the loss falls: it was not seen"
    if losses.nonfinite_step is not None:
        return "check that the loss has recovered"
    if not losses.comparable:
        return "check the losses one by one: their sum does not show whether they fall"
    if losses.fallen is None:
        return f"check that the loss falls: {SETTLED} steps are too few to show it"
    return "nothing to do"
