"""At which steps each quantity is measured: at fixed ones, or within a budget, oftener near the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lsp_callbacks._validation import number, whole
from lsp_callbacks.monitor.account import ADVANCE, Account, Pace, union
from lsp_callbacks.monitor.choice import Choice

#: Share of the budget that measurements may spend, as counted. The rest is for what is not counted: the calls of each
#: step, copies of the module, what a first measurement takes beside its passes.
MODELLED = 0.8
#: Number of readings whose mean is the Courant number.
RECENT = 3
#: Courant numbers at which the headline number begins to be measured more often, and from which on most often.
FAR, NEAR = 0.5, 0.75
#: Levels of nearness between the two: few, so that it seldom changes.
LEVELS = 8

#: Of every quantity, of some by name, or of none.
EveryNSteps = int | Mapping[str, int] | None
#: A Courant number, or what returns it, which is asked at the first question for a step alone.
Scheduled = float | Callable[[], float]


def check_every_n_steps(value: Any) -> EveryNSteps:
    """Return ``every_n_steps`` if it is None, a whole number, or whole numbers by name.

    Raises:
        ValueError: for anything else.
    """
    instead = ", a mapping such as {'spectral_norm': 500}, or None for the budget"
    if isinstance(value, Mapping):
        return {name: whole(f"every_n_steps[{name!r}]", every, 1) for name, every in value.items()}
    return None if value is None else whole("every_n_steps", value, 1, instead=instead)


def nearness(courant: float) -> float:
    """Return how near the edge of stability a Courant number is, from 0 (below 1/2, or NaN) to 1 (from 3/4 on).

    A growing learning rate is near well before it reaches the edge. In eighths, so that it seldom changes.

    Example:
        >>> from lsp_callbacks.monitor.cadence import nearness
        >>> [nearness(courant) for courant in (0.0, 0.5, 0.625, 0.75, 2.0, float("nan"))]
        [0.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    """
    if not courant > FAR:
        return 0.0
    return math.floor(LEVELS * min(1.0, (courant - FAR) / (NEAR - FAR))) / LEVELS


def nearer(near: float) -> float:
    """Return the Courant number from which on the nearness is larger than this one."""
    return math.inf if near >= 1 else FAR + (LEVELS * near + 1) / LEVELS * (NEAR - FAR)


class Cadence:
    """Decides what is measured at a step, from numbers that are the same in each run and on each process.

    A measurement that takes several steps is under way until it is complete; one that starts before enough is known is
    postponed.

    A given number of steps is followed exactly; if such a step is skipped, the next one takes its place. All other
    quantities share an `Account`, of which each may spend a part: its *rate*. Its period is its price over its rate.
    The first readings are at 0, 1, 2, 4, 8, ... steps, as long as the advance pays for them. At any time, gradients by
    the cost model satisfy

        ``spent <= budget * step_cost * (steps since the first measurement) + advance``

    The *headline number* (``stability/courant``) comes first: its rate is put by for it, and what it needs for its
    first readings is left to it. Far from the edge of stability it is measured once in ``1 / budget`` steps, if its
    rate allows that, and the others have what it leaves, see `rates`. Near the edge it takes half of the others' rates,
    from the first step on, and what is saved beyond a round of them. So its gap is never longer than
    ``max(price / rate, 1 / budget)``.

    The others take turns, the one that has waited for most of its periods first; none is measured a second time before
    all were measured once that their rates can pay soon. They meet the headline number, where their periods are longer:
    what several measurements of a step spend gradients on (a replay, an alignment) is spent once. Far from the edge
    they start after half a period, too, if enough is free.

    The next step at which anything can start is known in closed form, as long as nothing changes: until then, or until
    the scheduled rate comes nearer to the edge, a step is compared with a number, and that is all.

    Args:
        every_n_steps: start a measurement every so many steps; by name for some quantities; None keeps to the budget.
        budget: gradients spent on measuring, as a share of those spent on training.

    Raises:
        ValueError: for a cadence below 1 or a budget outside (0, 1].

    Attributes:
        paces: of each quantity that is measured, by name.
        account: of the gradients. Its advance is that of `ADVANCE` steps of training, and of one measurement of what
            the user named, if that is more.
        next_step: before it nothing starts, as long as nothing changes,
        wake: and the scheduled Courant number is below this.
        under_way: names of the quantities whose measurement has begun and is not complete.
    """

    def __init__(self, every_n_steps: EveryNSteps = None, budget: float = 0.05):
        self.every_n_steps = check_every_n_steps(every_n_steps)
        self.budget = number("budget", budget, above=0, most=1, instead=": a share of the training cost")
        self.paces: dict[str, Pace] = {}
        self.account = Account(self.paces, self.budget)
        self._choice = Choice(self.paces, self.account)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.account.reset()
        self._headline: str | None = None
        self.paces.clear()
        self._readings: list[float] = []
        self._step, self._scheduled = -1, math.nan  # of the last answer
        self._names: tuple[str, ...] = ()
        self._missed: tuple[str, ...] = ()  # of the answer before, if it was not taken: `training_step` returned None
        self._is_taken = False
        self.under_way: set[str] = set()
        self._changed()

    def _changed(self, near: float | None = None) -> None:
        """Share the budget out anew, and ask at the next step what comes next."""
        account = self.account
        account.settle(max(self._step, 0))
        account.share_out(self._headline, account.near if near is None else near)
        self.next_step: float = -math.inf
        self.wake = nearer(account.near)

    @property
    def headline(self) -> str | None:
        """Name of the quantity whose Courant number is followed; None without one."""
        return self._headline

    @headline.setter
    def headline(self, name: str | None) -> None:
        if name != self._headline:
            self._headline = name
            self._changed()

    def postpone(self, name: str, step: int) -> None:
        """Let a quantity wait until a step."""
        self.paces[name].postponed = step
        self.next_step = -math.inf

    def want(self, step: float) -> None:
        """Ask for one reading of the headline number from a step on, beside the budget; infinite asks for none."""
        if step != self.account.wanted:
            self.account.wanted = step
            self._changed()

    def add(self, name: str, *, weight: float = 1.0, length: int = 1) -> None:
        """Begin to measure a quantity.

        Args:
            name: of the quantity.
            weight: how fast it moves, beside the others.
            length: steps that a measurement takes; the next does not start before its end.
        """
        every = self.every_n_steps
        self.paces[name] = Pace(weight, length, every.get(name) if isinstance(every, Mapping) else every)
        self._changed()

    def check_names(self, names: Collection[str]) -> None:
        """Refuse a pace of what is not measured.

        Raises:
            ValueError: if ``every_n_steps`` is a mapping with other names than these.
        """
        given = self.every_n_steps if isinstance(self.every_n_steps, Mapping) else {}
        if unknown := [name for name in given if name not in names]:
            raise ValueError(
                f"every_n_steps gives a pace to {', '.join(map(repr, unknown))}, which is not measured: the quantities "
                f"are {', '.join(names)}"
            )

    def drop(self, name: str) -> None:
        """Measure a quantity no more; the others share what it had."""
        self.under_way.discard(name)
        self.paces.pop(name, None)
        self._names = tuple(other for other in self._names if other != name)
        self._changed()

    def period(self, name: str) -> float | None:
        """Return the steps in which the budget pays for a measurement, now; None before the price is known."""
        pace, account = self.paces[name], self.account
        if pace.every_n_steps is not None:
            return float(pace.every_n_steps)
        return None if pace.parts is None else max(pace.length, account.period(name))

    def waiting(self) -> dict[str, str]:
        """Return why quantities have no measurement yet, by name: they wait, or the budget has not paid for one."""
        reasons = {}
        for name, pace in self.paces.items():
            if pace.postponed is not None and pace.postponed > self._step and not pace.count:
                reasons[name] = f"it needs to see more steps: from {pace.postponed} on, once the budget pays for it"
            elif pace.every_n_steps is None and not pace.count and pace.parts is not None:
                reasons[name] = (
                    f"the budget pays {pace.price:.3g} gradients for it once in {self.period(name):.0f} steps: name it "
                    f"in every_n_steps={{{name!r}: ...}} to measure it more often, or give a larger budget"
                )
        return reasons

    # -- which start -----------------------------------------------------------------------------------------------

    def starting(self, step: int, *, scheduled: Scheduled = math.nan) -> tuple[str, ...]:
        """Return the quantities whose measurements start at this step; the first answer for a step is final.

        Those whose price is not known yet are among them: with `priced` the answer becomes another one.

        Args:
            step: number of the optimizer step.
            scheduled: the Courant number of the learning rate that this step will use; NaN if it is not known.
        """
        self._ask(step, scheduled)
        return tuple(name for name in self._names if name not in self.under_way)

    def _ask(self, step: int, scheduled: Scheduled) -> None:
        """Choose what starts at a step, once."""
        if step != self._step:
            # All numbers here are the same on all processes. If they were not, the processes would wait for each other
            # forever: this is the one place where rank 0's answer could be broadcast.
            self._missed, self._is_taken = () if self._is_taken else self._names, False
            self._step, self._names = step, ()
            scheduled = scheduled() if callable(scheduled) else scheduled
            if step >= self.next_step or scheduled >= self.wake:
                self._scheduled = scheduled
                if scheduled >= self.wake:
                    self._changed(nearness(scheduled))
                self._names = self._choose(step, self.under_way)

    def due(self, step: int, *, scheduled: Scheduled = math.nan) -> set[str]:
        """Return the quantities that are measured at this step: those that start, and those under way."""
        self._ask(step, scheduled)
        return {*self._names, *self.under_way}

    def is_complete(self, step: int, *, within: int = 0) -> bool:
        """Return True if no measurement is under way, and none is postponed to ``within`` the next steps.

        Args:
            step: that was observed last.
            within: a number of steps.
        """
        return not self.under_way and all(later - step > within for later in self.postponed.values())

    @property
    def postponed(self) -> dict[str, int]:
        """The quantities that wait, and the step from which on they need not wait any more."""
        return {name: pace.postponed for name, pace in self.paces.items() if pace.postponed is not None}

    def _choose(self, step: int, busy: Collection[str]) -> tuple[str, ...]:
        """Return what starts at a step; if nothing does, the next step to ask at becomes another one."""
        names, following = self._choice.make(step, busy=busy, missed=self._missed)
        if not names:
            self.next_step = following
        return names

    def interrupt(self) -> None:
        """Break off what is under way; what is due may begin anew at the same step."""
        self.under_way.clear()
        if self._step >= 0:
            self._names = self._choose(self._step, ())

    # -- what changes --------------------------------------------------------------------------------------------

    def wants_price(self, name: str) -> bool:
        """Return whether the price of a measurement is to be found out before it starts."""
        return self.paces[name].every_n_steps is None and self.paces[name].wants_price()

    def forget_prices(self) -> None:
        """Find out all prices anew before the next measurements."""
        for pace in self.paces.values():
            pace.is_stale = True

    def priced(
        self,
        parts: Mapping[str, Mapping[str, float]],
        *,
        named: Iterable[str] = (),
        counting: float = 0.0,
        step_cost: float = 1.0,
    ) -> None:
        """Set what measurements cost, before they start.

        Args:
            parts: gradients by quantity, and by what they are spent on.
            named: quantities that the user asked for, of which one measurement is always paid.
            counting: gradients that were spent on finding this out.
            step_cost: gradients that a whole step of training takes, which is more than one on a small network.
        """
        account = self.account
        account.settle(max(self._step, 0))
        for name, gradients in parts.items():
            pace = self.paces[name]
            pace.parts, pace.is_stale, pace.is_cold = dict(gradients), False, not pace.count
        wanted = {*named}
        # In the order of the quantities, not of a set: sums must be the same on all processes to the last bit.
        promised = [name for name, pace in self.paces.items() if name in wanted and name in parts and not pace.count]
        for name in promised:
            self.paces[name].is_promised = True
        together = union(parts[name] for name in promised)
        account.spent, account.step_cost = account.spent + counting, step_cost
        account.advance = max(account.advance, ADVANCE * step_cost, sum(together.values()) + counting)
        self._changed()
        if self._names:
            self._names = self._choose(self._step, {*self.paces} - {*self._names})

    def observed(self, step: int) -> tuple[tuple[str, ...], list[str]]:
        """Take note that what starts at this step can be measured; the account begins with the first such step.

        Returns:
            The names of what starts, and of those the ones whose price is to be found out before.
        """
        if self.account.origin is None:
            self.account.begin(step)
        self._is_taken = True
        names = self.starting(step)
        return names, [name for name in names if self.wants_price(name)]

    def started(self, step: int, names: Iterable[str], *, without: Collection[str] = ()) -> list[str]:
        """Charge the measurements that start at this step; what several of them spend on the same counts once.

        Args:
            step: number of the optimizer step.
            names: of the quantities.
            without: those of them that are put off.

        Returns:
            The names of the others.
        """
        started = [name for name in names if name not in without]
        self.account.pay(step, started)
        self.next_step = -math.inf
        return started

    def restart(self, name: str) -> None:
        """Begin a measurement anew at the next step, as it was interrupted."""
        self.postpone(name, 0)

    def read(self, courant: float) -> None:
        """Add a new reading of the Courant number."""
        if not math.isnan(courant):
            self._readings = [*self._readings, courant][-RECENT:]
            mean = sum(self._readings) / len(self._readings)
            # Too early costs a measurement, too late an alarm.
            courants = (mean, courant, *([] if math.isnan(self._scheduled) else [self._scheduled]))
            if (near := nearness(max(courants))) != self.account.near:
                self._changed(near)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and names only."""
        return {
            **self.account.state_dict(), "readings": list(self._readings), "under_way": sorted(self.under_way),
            "paces": {name: pace.state_dict() for name, pace in self.paces.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], *, windows: bool = False) -> None:
        """Continue from a state, with this cadence's own settings.

        A quantity that had a fixed pace and has none now begins anew, as its price was never found out.

        Args:
            state: that `state_dict` returned.
            windows: whether measurements that were under way can go on; otherwise they begin anew at the next step.
        """
        self.account.load_state_dict(state)
        self._readings, self._step, self._names = list(state["readings"]), -1, ()
        for name, pace in self.paces.items():
            saved = Pace()
            if name in state["paces"]:
                saved.load_state_dict(state["paces"][name])
            if pace.every_n_steps is not None or saved.parts is not None:
                pace.load_state_dict(saved.state_dict())
        if not self.account.spent and all(pace.every_n_steps is None for pace in self.paces.values()):
            self.account.origin = None
        self.account.share_out(self._headline, self.account.near)
        self.next_step, self.wake = -math.inf, nearer(self.account.near)
        under_way = {name for name in state["under_way"] if name in self.paces}
        self.under_way = under_way if windows else set()
        for name in under_way - self.under_way:
            self.restart(name)
