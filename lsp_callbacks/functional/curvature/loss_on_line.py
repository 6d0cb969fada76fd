"""What few evaluations show of a loss along an update: where it is expected to go up, and where to look next."""

from __future__ import annotations

import math
from typing import NamedTuple

#: By which factor the multiple grows or shrinks at most from one evaluation to the next.
GROWTH = 8.0
#: How often it is doubled where no crossing can be expected from what was seen.
DOUBLINGS = 4
#: How far beside the crossing that is expected an evaluation lies, relative; and in units of the tolerance, at least.
BESIDE, MARGIN = 0.1, 0.45
#: The widest bracket, relative, in which an interpolation is believed; its error by the distance from an end.
WIDE, DOUBT = 0.5, 0.1


class Point(NamedTuple):
    """What the loss is at a multiple s of the update."""

    s: float
    change: float
    rounding: float

    @property
    def chord(self) -> float:
        """The change for a unit of s: linear in s on a quadratic."""
        return self.change / self.s

    @property
    def is_clear(self) -> bool:
        """Whether the change is finite, and not hidden by rounding."""
        return self.rounding < abs(self.change) < math.inf


class Crossing(NamedTuple):
    """Where the loss is expected to go up.

    Attributes:
        s: the multiple.
        error: how far the crossing may be from it, relative.
        hidden: how far rounding may have moved it, relative.
    """

    s: float
    error: float
    hidden: float


class LossOnLine:
    """The evaluations of a loss along an update.

    Args:
        slope: of the loss at s = 0, negative; None where it is not known.
        tolerance: of the crossing, relative.

    Attributes:
        high: where the loss was seen above, the least such multiple.
        low: where it was not, the largest below that.
        deepest: where it was seen below most clearly.
    """

    def __init__(self, slope: float | None, tolerance: float):
        self._least_margin = MARGIN * tolerance
        # The chord begins with the slope.
        self._chords: list[tuple[float, float]] = [] if slope is None else [(0.0, slope)]
        self._points: list[Point] = []
        self._widths: list[float] = []
        self._is_rise_expected: bool | None = None
        self._latest, self._surprises = math.nan, 0
        self.low: Point | None = None
        self.high: Point | None = None
        self.deepest: Point | None = None

    def add(self, point: Point) -> None:
        """Take in an evaluation."""
        self._points.append(point)
        if point.is_clear:
            self._chords.append((point.s, point.chord))
        self.high = min((p for p in self._points if not p.change <= p.rounding), default=None)
        below = [p for p in self._points if self.high is None or p.s < self.high.s]
        self.low = max(below, default=None)
        self.deepest = min((p for p in below if p.change < -p.rounding), key=lambda p: p.change, default=None)

    # -- before there is a bracket -------------------------------------------------------------------------------------

    def further(self, low: Point) -> float:
        """Return a larger multiple, as the loss was not seen to rise so far."""
        expected, was_expected = self._extrapolated(), self._is_rise_expected
        self._is_rise_expected = low.s < expected < GROWTH * low.s
        if self._is_rise_expected:
            above = expected * (1 + BESIDE)
            if not was_expected:
                return above
            self._surprises += 1  # the chord bends down: not the same error again
            return max(above, min(2.0**self._surprises, GROWTH) * low.s)
        is_far = expected > low.s or not low.is_clear or len(self._points) > DOUBLINGS
        return (GROWTH if is_far else 2) * low.s

    def nearer(self, high: Point) -> float:
        """Return a smaller multiple, as the loss was not seen to fall so far."""
        expected, self._is_rise_expected = self._extrapolated(), False
        if not 0 < expected < high.s:
            return high.s / (2 if len(self._points) == 1 else GROWTH)
        return max(expected * (1 - BESIDE), high.s / GROWTH)

    def _extrapolated(self) -> float:
        """Return where the chord would be 0 beyond the last two of them; 0 where it would not, or is not known."""
        if len(self._chords) < 2:
            return 0.0
        (s, f), (t, g) = self._chords[-2:]
        return s - f * (t - s) / (g - f) if (g - f) * (t - s) > 0 else 0.0

    @property
    def is_level(self) -> bool:
        """Whether the loss has come to rest below, so that no rise is to be expected."""
        last = [p for p in self._points if p.is_clear][-3:]
        if self.high is not None or len(last) < 3 or not last[0].s <= last[1].s / 2 <= last[2].s / 4:
            return False
        changes = [p.change for p in last]  # two may be equal on both sides of the least loss
        return max(changes) - min(changes) <= last[-1].rounding

    # -- in a bracket --------------------------------------------------------------------------------------------------

    def crossing(self, low: Point, high: Point, deepest: Point) -> Crossing:
        """Return where the chord is 0 in a bracket, by the parabola through the nearest three of them.

        Its error is twice its distance from the straight line through the ends, and a tenth of that from the nearest of
        them; at most the bracket, and the bracket where that is wide. Where the loss was seen to be below, and rounding
        hides on which side it is now, the crossing is here.
        """
        s, error = self._interpolated(low, high) if low.is_clear else (low.s, 0.0)
        bracket = max(high.s - s, s - low.s) / s
        if low.is_clear and not (error < bracket and high.s - low.s <= WIDE * s):
            error = bracket
        # The chord from where the loss is seen to be below rises to 0 at the crossing.
        steepness = -deepest.chord * s**2 / (s - deepest.s) if s > deepest.s else math.inf
        return Crossing(s, error, 3 * low.rounding / steepness)

    def _interpolated(self, low: Point, high: Point) -> tuple[float, float]:
        if not math.isfinite(high.chord):
            return math.sqrt(low.s * high.s), math.inf
        width, rise = high.s - low.s, (high.chord - low.chord) / (high.s - low.s)
        straight = -low.chord / rise
        others = [(s, f) for s, f in self._chords if s not in (low.s, high.s)]
        if not others:
            return low.s + straight, math.inf
        s, f = min(others, key=lambda other: abs(other[0] - low.s - straight))
        bend = ((f - high.chord) / (s - high.s) - rise) / (s - low.s)
        # low.chord + rise x + bend x (x - width) at x = s - low.s has one zero in the bracket.
        linear = rise - bend * width
        root = linear + math.sqrt(max(0.0, linear**2 - 4 * bend * low.chord))
        x = -2 * low.chord / root if root > 0 else 0.0
        x = x if 0 < x < width else straight
        return low.s + x, (2 * abs(x - straight) + DOUBT * min(x, width - x)) / (low.s + x)

    def between(self, low: Point, high: Point, crossing: Crossing) -> float:
        """Return a multiple beside the crossing that is expected, on the side of the end that is further from it.

        Where the latest was on the other side of the crossing than intended, it lies beside by more than what is
        expected has moved since; where three of them have not halved the bracket, in its middle.
        """
        self._widths.append(high.s - low.s)
        s, middle = crossing.s, math.sqrt(low.s * high.s)
        was_high = self._points[-1].s >= high.s
        is_surprised = self._is_rise_expected is not None and was_high != self._is_rise_expected
        moved, self._latest = abs(s - self._latest) / s, s
        margin = max(self._least_margin, min(BESIDE, crossing.error))
        margin = max(margin, 2 * moved) if is_surprised and moved < 1 else margin
        self._is_rise_expected = high.s - s > s - low.s
        beside = s * (1 + margin) if self._is_rise_expected else s * (1 - margin)
        is_slow = len(self._widths) > 3 and self._widths[-1] > self._widths[-4] / 2
        if is_slow or not low.s < beside < high.s:
            self._is_rise_expected = None
            return middle
        return beside
