"""One sentence: how stable the training was, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lsp_callbacks.functional.first_fault import Fault
from lsp_callbacks.monitor import Curve
from lsp_callbacks.report.series import AVERAGE, averaged, latest, readings

#: Mean Courant numbers from which a run is "at the edge", and up to which: healthy full-batch training reaches 1.19 by
#: its curvature, and healthy training with small batches 1.8 by the stochastic number (see ``benchmarks/``).
EDGE, EDGE_SGD = (0.9, 1.2), (0.9, 2.0)

#: What to do about a fault, by where it was.
REMEDIES = {
    "forward": "keep that operation's input in its domain (clamp, eps, a mask before it), or compute it in float32",
    "backward": "keep that operation's input from where its derivative is infinite, by a clamp or a mask before it",
    "batch": "look at the data, or leave out what is not finite",
    "weights": "the update before made it: lower the learning rate, or clip the gradient",
    "unknown": "try torch.autograd.set_detect_anomaly(True)",
}


def verdict(history: Mapping[str, Curve], fault: Fault | None = None) -> str:
    """How stable the training was when it ended, why, and what to do.

    It speaks of *linear* stability: whether the linearised update amplifies. Where the stochastic Courant number was
    measured, its mean of 5 decides. Otherwise the exponent does: a run is stable if the upper bound is not positive,
    unstable if the value is (not its lower bound: windows scatter most when a run begins to fail), and the Courant
    number of one batch tells the edge, where healthy training may live, from what lies beyond. NaN is never stable, nor
    is a collapsed network. "Since" counts back over measurements without a break.
    Where several players take turns, it speaks of each by itself, and says so.

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
    judged = _judge(history) + _players(history)
    if fault is None:
        return f"lsp_callbacks: {judged}."
    before = f". Stability: {judged}" if history.keys() & {"stability/courant", "stability/lyapunov"} else ""
    return f"lsp_callbacks: not finite since step {fault.step}: {fault}; {REMEDIES[fault.where]}{before}."


def _players(history: Mapping[str, Curve]) -> str:
    """What the Courant number does not see where several players take turns."""
    if not any(key.startswith("stability/player_courant/") for key in history):
        return ""
    exponent = latest(history.get("stability/lyapunov_trajectory"))
    said = "" if math.isnan(exponent) else f" (exponent {exponent:+.2g} a step)"
    return f". That is each player by itself: how they drive each other is lyapunov_trajectory{said}"


def _judge(history: Mapping[str, Curve]) -> str:
    exponent, courants = (history.get(f"stability/{key}", Curve()) for key in ("lyapunov", "courant"))
    x, courant = latest(exponent), latest(averaged(courants))
    lower, upper = (latest(history.get(f"stability/lyapunov_{side}")) for side in ("lower", "upper"))
    if math.isnan(x) and math.isnan(courant):
        return _not_measured(history, max(len(exponent.values), len(courants.values)))

    collapsed = history.get("stability/collapsed", Curve())
    if (gone := _since(collapsed, 0.5)) is not None:
        return (
            f"collapsed since step {gone}: the outputs have ceased to depend on the inputs, and nothing can become "
            "unstable any more; start again with a lower learning rate"
        )
    stochastic = not math.isnan(latest(history.get("stability/courant_sgd")))
    near = EDGE_SGD if stochastic else EDGE
    deciding, edge = (averaged(courants), near[1]) if stochastic or math.isnan(x) else (exponent, 0.0)
    since = _since(deciding, edge)
    at = max(step for curve in (exponent, courants) for step, v in zip(curve.steps, curve.values) if not math.isnan(v))
    # A quantity that was given up (its last value is NaN) and one that never succeeded are both unknown.
    failed = max((_trailing_nans(curve) for curve in (exponent, courants)), key=len)
    numbers = " and ".join(filter(None, (_courant(courant, courants), _exponent(x, lower, upper))))
    ask = (
        f"divide the learning rate by {max(courant / 0.8, 1.2):.2g}" if courant > near[0] else "halve the learning rate"
    )

    if since is not None and not near[0] <= courant <= near[1]:
        hidden = ", though no single batch shows it in its curvature" if courant < near[0] else ""
        after = f"; from step {failed[0]} on, measurements failed (NaN)" if failed else ""
        return f"unstable since step {since} (linear stability): {numbers}{hidden}{after}; {ask}"
    if failed:
        return (
            f"stability is unknown since step {failed[0]}: the last {_count(len(failed))} failed (NaN); the readings "
            f"before say that {numbers}; look for the warning that names the reason"
        )
    if since is not None or upper > 0 >= x or x > 0 or courant >= near[0]:
        return (
            f"at the edge of stability at step {at} (linear stability): {numbers}; healthy as long as the loss "
            f"falls, otherwise {ask}"
        )
    beyond = [step for step, v in zip(deciding.steps, deciding.values) if v > edge]
    if beyond:
        return (
            f"stable at step {at} (linear stability), but not always between steps {beyond[0]} and {beyond[-1]}: "
            f"{numbers}; see that the loss has recovered"
        )
    return f"stable at step {at} (linear stability): {numbers}; nothing to do"


def _not_measured(history: Mapping[str, Curve], tried: int) -> str:
    if tried:
        return f"stability was not measured: {_count(tried)} failed (NaN); look for the warning that names the reason"
    if not history:
        return "stability was not measured: no measurement was completed; train longer, or measure more often"
    kinds = {
        "stability/spectral_norm_max": "the largest spectral norm of a layer is {:.3g}",
        "stability/residual_gain_max": "the largest gain of a residual block is {:+.2g} (above 0 it expands)",
    }
    known = [text.format(value) for key, text in kinds.items() if not math.isnan(value := latest(history.get(key)))]
    return (
        "the stability of the optimizer's steps was not measured (no Courant number, no exponent)"
        + (f"; {' and '.join(known)}, which does not tell whether the learning rate is too large" if known else "")
        + "; if you did not choose that, the warning at the start of training says why"
    )


def _courant(mean: float, courants: Curve) -> str:
    of = min(len(readings(courants)), AVERAGE)
    return f"the Courant number is {mean:.2g} ({f'mean of {of}, ' if of > 1 else ''}the edge is at 1)" if of else ""


def _exponent(x: float, lower: float, upper: float) -> str:
    bounds = "" if math.isnan(upper - lower) else f", 90 % bounds {lower:+.2g} and {upper:+.2g}"
    return "" if math.isnan(x) else f"the sharp mode {e_folding(x)} (exponent {x:+.2g}{bounds})"


def e_folding(exponent: float) -> str:
    """An exponent in words.

    Example:
        >>> e_folding(0.25), e_folding(-0.001), e_folding(0.0)
        ('grows by e in 4 steps', 'shrinks by e in 1,000 steps', 'keeps its size')
    """
    if abs(exponent) < 1e-6:
        return "keeps its size"
    steps = 1 / abs(exponent)
    return f"{'grows' if exponent > 0 else 'shrinks'} by e in {steps:{',.0f' if steps >= 10 else '.2g'}} steps"


def _count(measurements: int) -> str:
    return f"{measurements} measurements" if measurements > 1 else "measurement"


def _trailing_nans(curve: Curve) -> list[int]:
    """The steps of the measurements that failed since the last one that did not."""
    begin = max((i + 1 for i, value in enumerate(curve.values) if not math.isnan(value)), default=0)
    return curve.steps[begin:]


def _since(curve: Curve, edge: float) -> int | None:
    """First step of the unbroken run above the edge that reaches to the last reading."""
    since = None
    for step, value in zip(reversed(curve.steps), reversed(curve.values)):
        if value <= edge:
            break
        since = since if math.isnan(value) else step
    return since
