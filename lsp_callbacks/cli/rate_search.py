"""The search for the largest learning rate at which a run from its initial weights stays below the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lsp_callbacks.errors import Unmeasurable

#: A run has fallen behind another one where it lacks this share of what the loss of that one has fallen; the second is
#: for one at the edge, where the sharpest direction neither grows nor falls.
BEHIND, BEHIND_AT_EDGE = 0.1, 0.5
#: Natural logarithms of a Courant number that are 0.
LEVEL = 0.05
#: Slopes of log(Courant number) over log(rate): 1 where the curvature is what it is, less where it follows the rate.
SLOPES = (0.25, 1.0)
#: The slope where only one run has settled.
SLOPE = 0.5
#: Runs at most, and by what a rate that seems stable is divided and multiplied to look at others.
MOST, WIDE = 16, 4.0
#: Two rates this close are one.
CLOSE = 1.1


@dataclass(frozen=True)
class TrialRun:
    """A short run at one constant rate, from the initial weights.

    Attributes:
        rate: the largest of the parameter groups.
        steps: that were taken.
        courant: mean Courant number of the later half; of the last readings, where it ended early; NaN without any.
        error: its relative standard error.
        start: loss at first.
        end: mean loss of the last quarter.
        failure: why it ended early or is of no use; empty where it settled.
    """

    rate: float
    steps: int
    courant: float
    error: float
    start: float
    end: float
    failure: str = ""

    @property
    def excess(self) -> float:
        """Log of the Courant number: above 0 the run is beyond the edge."""
        return math.log(self.courant) if self.courant > 0 else -math.inf if self.courant == 0 else math.nan

    @property
    def critical(self) -> float:
        """The critical rate that was measured along it; NaN if none was."""
        return self.rate / self.courant if self.courant > 0 else math.inf if self.courant == 0 else math.nan

    @property
    def is_level(self) -> bool:
        """Whether the run was at the edge, as far as that can be told."""
        return not self.failure and abs(self.excess) <= max(LEVEL, 2 * self.error)


@dataclass(frozen=True)
class StableRate:
    """The largest stable learning rate.

    Attributes:
        value: the estimate.
        low, high: its interval.
    """

    value: float
    low: float
    high: float


class RateSearch:
    """Finds the rate at which runs from the initial weights arrive at the edge of stability.

    At the initial weights the critical rate is up to 60 times the one that trains: the curvature grows while a network
    leaves its initial phase, and how far depends on the rate, as training at the edge keeps ``eta`` times the curvature
    there. So the largest stable rate is a fixed point: the ``eta`` whose run, once it has settled, has the critical
    rate ``c(eta) = eta``. It is looked for from above, ``eta <- min(eta / 2, c(eta))``, which is cheap, as runs that
    fail end early; in between, ``log c`` is taken for linear in ``log eta``. Beyond the edge is a run with a Courant
    number above 1 once it has settled, one that has exploded, and one that has fallen behind a run at a lower rate: a
    network that is stuck at its first outputs has hardly any curvature, and any rate would look stable. For that a
    quarter of the rate is tried, too. The last run is at the rate that is found, again if it was tried before: other
    batches have to find it stable, too.

    Args:
        first: the critical rate at the initial weights.

    Attributes:
        runs: in their order.
    """

    def __init__(self, first: float):
        self.first, self.runs = first, list[TrialRun]()

    def add(self, run: TrialRun) -> None:
        """Take in a run."""
        self.runs.append(run)

    def is_beyond(self, run: TrialRun) -> bool:
        """Return whether a run was beyond the edge."""
        if run.failure or not run.excess <= max(LEVEL, 2 * run.error):  # NaN is not stable
            return True
        lower = [other for other in self.runs if other.rate < run.rate and not other.failure]
        share = BEHIND_AT_EDGE if run.is_level else BEHIND
        return any(run.end - other.end > share * (other.start - other.end) > 0 for other in lower)

    @property
    def above(self) -> TrialRun | None:
        """The run beyond the edge with the lowest rate."""
        return min(filter(self.is_beyond, self.runs), key=lambda run: run.rate, default=None)

    @property
    def below(self) -> TrialRun | None:
        """The run with the highest rate below all that were beyond the edge."""
        most = math.inf if self.above is None else self.above.rate
        stable = [run for run in self.runs if run.rate < most and not self.is_beyond(run)]
        return max(stable, key=lambda run: run.rate, default=None)

    def next_rate(self) -> float | None:
        """Return the rate of the next run; None where the search is over.

        Raises:
            Unmeasurable: if no run was stable, or none had a limit.
        """
        below, above = self.below, self.above
        if not self.runs:
            return self.first
        if len(self.runs) >= MOST:
            self.estimate()
            return None
        if below is None:
            assert above is not None
            return min(above.rate / 2, above.critical if above.critical > 0 else math.inf)
        if not any(1.5 <= below.rate / run.rate <= 2 * WIDE for run in self.runs):
            return below.rate / WIDE
        if above is None and not below.critical < math.inf:
            raise Unmeasurable("no learning rate is unstable: nothing limits it here")
        value, last = self.estimate().value, self.runs[-1]
        return None if not self.is_beyond(last) and math.isclose(last.rate, value, rel_tol=CLOSE - 1) else value

    @property
    def is_candidate(self) -> bool:
        """Whether the next run is at the rate that has been found so far, and may be the last one."""
        return self.below is not None and self.next_rate() == self.estimate().value

    def estimate(self) -> StableRate:
        """Return the largest stable rate from the runs on both sides of the edge.

        Raises:
            Unmeasurable: if no run was stable.
        """
        below, above = self.below, self.above
        if below is None:
            raise Unmeasurable(_nothing(self.runs))
        crosses = above is not None and not above.failure and above.excess > max(below.excess, 0)
        slope = self._slope(below, above if crosses else None)
        root, error = math.exp(-below.excess / slope) * below.rate, math.exp(2 * below.error / slope)
        ceiling = WIDE * below.rate if above is None else above.rate
        if above is None or crosses:
            value = min(root, ceiling)
            return StableRate(value, min(root / error, value), max(min(root * error, ceiling), value))
        # It lies where runs have failed, not where Courant numbers cross 1.
        value = min(root, math.sqrt(ceiling * below.rate))
        value = below.rate if value <= CLOSE * below.rate else value  # that one was tried
        return StableRate(value, min(root / error, below.rate), ceiling)

    def _slope(self, below: TrialRun, above: TrialRun | None) -> float:
        """Return the slope of log(Courant number) over log(rate), by the nearest run that has settled."""
        lower = [run for run in self.runs if not run.failure and run.rate < below.rate and run.courant > 0]
        other = above or max(lower, key=lambda run: run.rate, default=None)
        if other is None:
            return SLOPE
        secant = (other.excess - below.excess) / math.log(other.rate / below.rate)
        return min(max(secant, SLOPES[0]), SLOPES[1])


def _nothing(runs: Sequence[TrialRun]) -> str:
    last = runs[-1]
    why = last.failure or f"its Courant number is {last.courant:.2g}"
    return (
        f"no run of {len(runs)} was stable, down to a learning rate of {last.rate:.3g} ({why}): look at the loss and "
        "at the initial weights, give more --run_steps, or a warm-up"
    )
