"""The search for the least multiple of an update at which a loss goes up, by few evaluations of that loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lsp_callbacks._validation import number
from lsp_callbacks.errors import Unmeasurable

#: From a multiple to the change of the loss there, and the size of its error by rounding.
Change = Callable[[float], tuple[float, float]]

#: The largest error by rounding that is accepted, relative to the multiple.
CLEAR = 0.1
#: By which factor the multiple grows or shrinks at most from one evaluation to the next.
GROWTH = 8.0
#: How often it is doubled where no crossing can be expected from what was seen.
DOUBLINGS = 4
#: How far from the first multiple the search goes, to either side, before it is given up.
FURTHEST, NEAREST = GROWTH**8, 2.0**-10
#: Share of the tolerance by which an evaluation lies beside the crossing that is expected.
MARGIN = 0.45
#: Evaluations at most; a bisection to 1e-15 takes 50.
MOST = 80


class CriticalStep(NamedTuple):
    """Where a loss goes up along an update.

    Attributes:
        multiple: of the update.
        error: how far from it the crossing can be, relative to it: by the width of the last bracket and by rounding.
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
    chord ``(L(theta + s u) - L(theta)) / s``, linear in s on a quadratic, begins with the slope. Where it would be
    0 the crossing is expected, and the evaluations lie beside it, by less than half of the tolerance, so that two of
    them close the bracket. A bisection follows where three evaluations have not halved it.

    The slope only shortens the search: the result lies between a multiple at which the loss was seen not to be above
    ``L(theta)``, and one at which it was seen to be above. A crossing below ``start`` after which the loss falls again
    is not seen.

    Args:
        change: ``s -> (L(theta + s u) - L(theta), size of its error by rounding)``, for positive s; a change that is
            not finite counts as above 0.
        slope: ``g . u``; None where it is not known.
        start: the first multiple: the last one that was found, or 1.
        tolerance: width of the last bracket, relative. No bracket becomes narrower than the rounding.

    Returns:
        The multiple, its error, and how often the loss was evaluated.

    Raises:
        Unmeasurable: where the loss does not fall along the update; where it has not risen at 2e7 times ``start``;
            where rounding of the losses hides the crossing: its error would exceed 10 %.
        ValueError: if ``start`` or ``tolerance`` is not positive and finite.

    Cost: on a quadratic 2 evaluations if ``start`` is right within the tolerance, 3 if it is within a factor of 8.

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
    search, is_doubtful = _Search(None if is_uphill else slope, tolerance), False
    for passes in range(1, MOST + 1):
        point = _Point(s, *change(s))
        search.add(point)
        low, high, deepest = search.low, search.high, search.deepest
        if is_uphill and low is None:
            raise Unmeasurable(
                f"the update does not lower the loss of its batch: to first order it changes it by {slope:.3g}, and at "
                f"{s:.3g} times the update it has changed by {point.change:.3g}: momentum takes it uphill, or the "
                "optimizer does not follow the gradient"
            )
        if not start * NEAREST < s < start * FURTHEST:
            raise Unmeasurable(
                f"the loss of its batch does not {'fall' if s < start else 'rise'} along the update: at {s:.3g} times "
                f"the update it has changed by {point.change:.3g}"
            )
        if high is None:
            s = search.further(point)
        elif low is None:
            s = search.nearer(point)
        elif deepest is None:  # what was seen below may be nothing but rounding: once more, where it should be deep
            if is_doubtful:
                raise _hidden(low)
            is_doubtful, s = True, low.s / 2
        else:
            expected = search.crossing(low, high)
            width, hidden = (high.s - low.s) / expected, low.hidden(deepest, expected)
            if width <= max(tolerance, hidden):
                if hidden > CLEAR:
                    raise _hidden(low)
                return CriticalStep(expected, max(high.s - expected, expected - low.s) / expected + hidden, passes)
            s = search.between(low, high, expected)
    raise Unmeasurable(f"the least multiple of the update that raises the loss was not found in {MOST} evaluations")


class _Point(NamedTuple):
    """What the loss is at a multiple s of the update."""

    s: float
    change: float
    rounding: float

    @property
    def chord(self) -> float:
        return self.change / self.s

    def hidden(self, deepest: _Point, crossing: float) -> float:
        """Return how far below this point the crossing may be, relative, if rounding hides on which side it is.

        The chord from where the loss is seen to be below rises to 0 at the crossing.
        """
        if self.change < -self.rounding:
            return 0.0
        steepness = -deepest.chord * crossing**2 / (crossing - deepest.s)
        return 2 * self.rounding / steepness


class _Search:
    """What is known of a loss along an update, and where to look next.

    Attributes:
        high: where the loss was seen above, the least such multiple.
        low: where it was not, the largest below that.
        deepest: where it was seen below most clearly.
    """

    def __init__(self, slope: float | None, tolerance: float):
        self.margin = MARGIN * tolerance
        # The chord begins with the slope.
        self._chords: list[tuple[float, float]] = [] if slope is None else [(0.0, slope)]
        self._points: list[_Point] = []
        self._widths: list[float] = []
        self._is_rise_expected, self._latest = False, math.inf
        self.low: _Point | None = None
        self.high: _Point | None = None
        self.deepest: _Point | None = None

    def add(self, point: _Point) -> None:
        """Take in an evaluation."""
        self._points.append(point)
        if math.isfinite(point.change) and abs(point.change) > point.rounding:
            self._chords.append((point.s, point.chord))
        self.high = min((p for p in self._points if not p.change <= p.rounding), default=None)
        below = [p for p in self._points if self.high is None or p.s < self.high.s]
        self.low = max(below, default=None)
        self.deepest = min((p for p in below if p.change < -p.rounding), key=lambda p: p.change, default=None)

    def _expected(self) -> float:
        """Return where the chord would be 0, beyond the last two of them; 0 where it would not, or is not known."""
        if len(self._chords) < 2:
            return 0.0
        (s, f), (t, g) = self._chords[-2:]
        return s - f * (t - s) / (g - f) if (g - f) * (t - s) > 0 else 0.0

    def further(self, low: _Point) -> float:
        """Return a larger multiple, as the loss was not seen to rise so far."""
        expected = self._expected()
        is_flat, was_expected = abs(low.change) <= low.rounding, self._is_rise_expected
        self._is_rise_expected = low.s < expected < GROWTH * low.s
        if self._is_rise_expected:
            above = expected * (1 + self.margin)
            return max(above, 2 * low.s) if was_expected else above  # the chord bends down: not the same error again
        is_far = expected > low.s or is_flat or len(self._points) > DOUBLINGS
        return (GROWTH if is_far else 2) * low.s

    def nearer(self, high: _Point) -> float:
        """Return a smaller multiple, as the loss was not seen to fall so far."""
        expected = self._expected()
        if not 0 < expected < high.s:
            return high.s / (2 if len(self._points) == 1 else GROWTH)
        return max(expected * (1 - self.margin), high.s / GROWTH)

    def between(self, low: _Point, high: _Point, expected: float) -> float:
        """Return a multiple beside the crossing that is expected, on the open side, or the middle."""
        self._widths.append(high.s - low.s)
        if len(self._widths) > 3 and self._widths[-1] > self._widths[-4] / 2:
            return math.sqrt(low.s * high.s)
        moved, self._latest = abs(expected - self._latest), expected
        before, last = (p.s >= high.s for p in self._points[-2:])
        margin = self.margin * expected
        below, above = expected - margin, expected + margin
        if before == last:  # twice on one side: to the other, by more than what was expected has moved
            below, above = min(below, expected - 2 * moved), max(above, expected + 2 * moved)
        near = 0.2 * margin
        is_above = not below > low.s + near or (before == last and not last)
        s = above if is_above and above < high.s else below
        return s if low.s < s < high.s else math.sqrt(low.s * high.s)

    def crossing(self, low: _Point, high: _Point) -> float:
        """Return where the chord is 0 between two multiples, by the parabola through the nearest three points."""
        if not math.isfinite(high.chord):
            return math.sqrt(low.s * high.s)
        if low.chord >= 0:
            return low.s
        a, b, fa, fb = low.s, high.s, low.chord, high.chord
        rise = (fb - fa) / (b - a)
        linear = a - fa / rise
        others = [(s, f) for s, f in self._chords if s not in (a, b) and math.isfinite(f)]
        if not others:
            return linear
        c, fc = min(others, key=lambda other: abs(other[0] - linear))
        bend = ((fc - fb) / (c - b) - rise) / (c - a)
        # fa + rise x + bend x (x - (b - a)) at x = s - a, with one zero between its ends.
        p = rise - bend * (b - a)
        root = p * p - 4 * bend * fa
        x = -2 * fa / (p + math.sqrt(root)) if root > 0 and p + math.sqrt(root) > 0 else 0.0
        return a + x if 0 < x < b - a else linear


def _hidden(point: _Point) -> Unmeasurable:
    return Unmeasurable(
        f"rounding hides where the loss rises: at {point.s:.3g} times the update it changes "
        f"by {point.change:.2g}, with an error of {point.rounding:.2g} by rounding; measure in float32 or float64"
    )
