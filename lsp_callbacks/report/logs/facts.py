"""Facts about a run for its verdict, from what its logs hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.monitor.losses import SMOOTHING, ArrivedLoss, LossRecord
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.report.curves import readings
from lsp_callbacks.report.judgement import Run
from lsp_callbacks.report.logs.logged_run import LoggedRun, UnreadableLogs

#: Names of the training loss, the likeliest first; others that hold "loss" and none of these words come last.
LOSSES = ("train_loss_step", "train/loss_step", "train_loss", "train/loss", "training_loss", "loss_step", "loss")
NOT_TRAINING = re.compile(r"val|test|eval|predict|stability/", re.IGNORECASE)
#: A smoothed loss is a mean over at least so many logged ones.
LOGGED = 5
#: Keys of steps at which something happened.
EVENT, STOP, NONFINITE = (f"{PREFIX}{name}" for name in ("event", "stop", "nonfinite_step"))
#: What the logs cannot say.
UNSAID = "the training was ended (the reason was printed, and is not in the logs)"


def loss_key(curves: Mapping[str, Curve], given: str | None = None) -> str | None:
    """Return the key of the training loss; None if there is none.

    Args:
        curves: of the logs.
        given: the user's choice.

    Raises:
        UnreadableLogs: if the user's choice is not logged.

    Example:
        >>> loss_key({"val_loss": Curve(), "my_loss": Curve(), "train_loss": Curve()})
        'train_loss'
        >>> loss_key({"val_loss": Curve(), "generator_loss": Curve(), "other_loss": Curve()}) is None
        True
    """
    if given is not None:
        if given not in curves:
            raise UnreadableLogs(f"--loss {given} is not logged: give one of {', '.join(sorted(curves))}")
        return given
    for name in LOSSES:
        if name in curves:
            return name
    others = [key for key in curves if "loss" in key.lower() and not NOT_TRAINING.search(key)]
    return others[0] if len(others) == 1 else None


def stride_of(curve: Curve) -> int:
    """Return the usual number of steps from one value to the next."""
    return max(1, round(float(np.median(np.diff(curve.steps))))) if len(curve.steps) > 1 else 1


def loss_record(curve: Curve) -> LossRecord:
    """Return the record of a loss that was logged once in several steps.

    Each logged loss stands for the steps since the one before it, so that the record smooths over as many steps as in
    training, but for no more than lets a smoothed loss be a mean of 5 logged ones: a single batch shows no rise.
    """
    record = LossRecord()
    held = min(stride_of(curve), SMOOTHING // LOGGED)
    before = -1
    for step, loss in zip(curve.steps, curve.values):
        count = min(held, max(1, step - before)) if math.isfinite(loss) else 1
        for at in range(step - count + 1, step + 1):
            record.add(ArrivedLoss(at, loss))
        before = step
    return record


def facts(run: LoggedRun, loss: str | None = None) -> Run:
    """Return the facts that a verdict rests on, as far as they are logged.

    Args:
        run: what was logged.
        loss: key of the training loss; None if it is not logged.
    """
    history = run.history
    losses = None if loss is None else loss_record(run.curves[loss])
    last = run.last_step
    # A run that has gone on after its stop, resumed or rolled back, was not ended by it.
    stops = [step for step in _steps(history.get(STOP)) if last is not None and last <= step + 1]
    stopped = {"stop": stops[-1], "reason": UNSAID} if stops else {}
    return Run(
        history,
        _fault(history, None if loss is None else run.curves[loss]),
        last,
        losses,
        min(_steps(history.get(EVENT)), default=None),
        **stopped,  # type: ignore[arg-type]
    )


def _steps(curve: Curve | None) -> list[int]:
    """Return the steps that a curve has as its values."""
    return [int(value) for value in readings(curve) if math.isfinite(value)]


def _fault(history: Mapping[str, Curve], loss: Curve | None) -> Fault | None:
    """Return the first NaN or Inf that was logged, unless finite losses were logged after it."""
    steps = _steps(history.get(NONFINITE))
    if not steps:
        return None
    after = [] if loss is None else [value for step, value in zip(loss.steps, loss.values) if step > steps[0]]
    if after and math.isfinite(after[-1]):
        return None
    return Fault(steps[0], "unknown", reason="the logs hold its step alone")
