"""The search for the least multiple of an update at which a loss goes up, by few evaluations of that loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lsp_callbacks._validation import number
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.loss_on_line import GROWTH, LossOnLine, Point

#: From a multiple to the change of the loss there, and the size of its error by rounding.
Change = Callable[[float], tuple[float, float]]

#: The largest error by rounding that is accepted, relative to the multiple.
CLEAR = 0.1
#: How far from the first multiple, and from the update itself, the search goes before it is given up.
FURTHEST, NEAREST = GROWTH**8, 2.0**-10
#: Evaluations at most; a bisection to 1e-15 takes 50.
MOST = 80


class CriticalStep(NamedTuple):
    """Where a loss goes up along an update.

    Attributes:
        multiple: of the update.
        error: how far from it the crossing can be, relative to it: by the interpolation, and by rounding.
        passes: evaluations of the loss.
    """

    multiple: float
    error: float
    passes: int


def critical_step(
    change: Change, *, slope: float | None = None, start: float = 1.0, tolerance: float = 0.05
) -> CriticalStep:
    """Return the least multiple s of an update u at which ``L(theta + s u) > L(theta)``, as far as evaluations show it.

    From ``start`` the multiple grows until the loss is above ``L(theta)``, at most eightfold at a time and at first by
    doublings where no crossing is expected, or it shrinks until the loss is below. Then this bracket is narrowed. The
    chord ``(L(theta + s u) - L(theta)) / s``, linear in s on a quadratic, begins with the slope. Where it would be 0
    the crossing is expected, and the next evaluations lie beside it; a bisection follows where three have not halved
    the bracket. The result is the zero of the parabola through the three nearest chords. Its error is estimated by
    twice its distance from the zero of the straight line, and a tenth of that from an end of the bracket: which was
    tested on many losses, and is no bound. In a wide bracket it is the bracket.

    The slope only shortens the search: the result lies between a multiple at which the loss was seen not to be above
    ``L(theta)``, and one at which it was seen to be above. A crossing below ``start`` after which the loss falls again
    is not seen.

    Args:
        change: ``s -> (L(theta + s u) - L(theta), size of its error by rounding)``, for positive s; a change that is
            not finite counts as above 0.
        slope: ``g . u``; None where it is not known.
        start: the first multiple: the last one that was found, or 1.
        tolerance: of the multiple, relative; rounding may add to it.

    Returns:
        The multiple, its error, and how often the loss was evaluated.

    Raises:
        Unmeasurable: where the loss does not fall along the update, down to a thousandth of it; where it has not risen
            at 2e7 times the update and ``start``; where rounding of the losses hides the crossing: its error would
            exceed 10 %.
        ValueError: if ``start`` or ``tolerance`` is not positive and finite.

    Cost: on a quadratic 2 or 3 evaluations if ``start`` is right within a factor of 8.

    Source: Kalra et al. 2026 (a bracket by doublings, then bisections); the chord and its slope are added here.

    Example:
        >>> from lsp_callbacks.functional import critical_step
        >>> result = critical_step(lambda s: (s * s - 4 * s, 0.0), slope=-4.0)
        >>> round(result.multiple, 9), result.passes
        (4.0, 3)
    """
    number("start", start, above=0, most=1e300)
    number("tolerance", tolerance, above=0, most=1)
    is_uphill = slope is not None and not slope < 0
    s = start = start / GROWTH if is_uphill else start
    nearest, furthest = min(start, 1.0) * NEAREST, max(start, 1.0) * FURTHEST  # a start may be far from this update
    line, is_doubtful = LossOnLine(None if is_uphill else slope, tolerance), False
    for passes in range(1, MOST + 1):
        point = Point(s, *change(s))
        line.add(point)
        low, high, deepest = line.low, line.high, line.deepest
        if is_uphill and low is None:
            raise Unmeasurable(
                f"the update does not lower the loss of its batch: to first order it changes it by {slope:.3g}, and at "
                f"{s:.3g} times the update it has changed by {point.change:.3g}: momentum takes it uphill, or the "
                "optimizer does not follow the gradient"
            )
        if (low is None and s <= nearest) or (high is None and (s >= furthest or line.is_level)):
            raise Unmeasurable(
                f"the loss of its batch does not {'fall' if low is None else 'rise'} along the update: at {s:.3g} "
                f"times the update it has changed by {point.change:.3g}"
            )
        if high is None:
            s = line.further(point)
        elif low is None:
            s = line.nearer(point)
        elif deepest is None:  # what was seen below may be nothing but rounding: once more, where it should be deep
            if is_doubtful:
                raise _hidden(low)
            is_doubtful, s = True, low.s / 2
        else:
            crossing = line.crossing(low, high, deepest)
            if crossing.error <= max(tolerance, crossing.hidden):
                if crossing.hidden > CLEAR:
                    raise _hidden(low)
                return CriticalStep(crossing.s, crossing.error + crossing.hidden, passes)
            s = line.between(low, high, crossing)
    raise Unmeasurable(f"the least multiple of the update that raises the loss was not found in {MOST} evaluations")


def _hidden(point: Point) -> Unmeasurable:
    return Unmeasurable(
        f"rounding hides where the loss rises: at {point.s:.3g} times the update it changes "
        f"by {point.change:.2g}, with an error of {point.rounding:.2g} by rounding; measure in float32 or float64"
    )
