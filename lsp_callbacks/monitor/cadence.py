"""At which steps each quantity is measured: at fixed ones, or within a budget, oftener near the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lsp_callbacks._validation import number, whole
from lsp_callbacks.monitor.choice import Choice
from lsp_callbacks.monitor.pace import Pace
from lsp_callbacks.monitor.shares import nearness, rates
from lsp_callbacks.monitor.spending import Spending, union

#: Share of the budget that measurements may spend, as counted. The rest is for what is not counted: the calls of each
#: step, copies of the module, what a first measurement takes beside its passes.
MODELLED = 0.8
#: Steps of training whose cost may be spent before any was saved: on one measurement of everything, and on the first
#: ones of the headline number.
ADVANCE = 15.0
#: Number of readings whose mean is the Courant number.
RECENT = 3

#: Of every quantity, of some by name, or of none.
EveryNSteps = int | Mapping[str, int] | None


def check_every_n_steps(value: Any) -> EveryNSteps:
    """Return ``every_n_steps`` if it is None, a whole number, or whole numbers by name.

    Raises:
        ValueError: for anything else.
    """
    instead = ", a mapping such as {'spectral_norm': 500}, or None for the budget"
    if isinstance(value, Mapping):
        return {name: whole(f"every_n_steps[{name!r}]", every, 1) for name, every in value.items()}
    return None if value is None else whole("every_n_steps", value, 1, instead=instead)


class Cadence:
    """Decides when measurements start, from numbers that are the same in each run and on each process.

    A given number of steps is followed exactly; if such a step is skipped, the next one takes its place. All other
    quantities share an account. It begins with an *advance*, and each step adds the share ``budget`` of its own cost,
    of which a quantity's part is its ``weight`` over the sum of those that are measured: its *rate*. Its period is its
    price over its rate. The first readings are at 0, 1, 2, 4, 8, ... steps, as long as the advance pays for them. At
    any time, gradients by the cost model satisfy

        ``spent <= budget * step_cost * (steps since the first measurement) + advance``

    The *headline number* (``stability/courant``) comes first: others leave in the account what it needs at its next
    reading. Far from the edge of stability it is measured once in ``1 / budget`` steps, if its rate allows that, and
    the others have what it leaves. Near the edge it takes half of the others' rates, and what was saved before. So its
    gap is never longer than ``max(price / rate, 1 / budget)``.

    The others meet it, where their periods are longer: what several measurements of a step spend gradients on (a
    replay, an alignment) is spent once. Beside others one becomes due in as many periods as its price there is a part
    of its full price, and after half of its period if the account holds more than what all have put by.

    Args:
        every_n_steps: start a measurement every so many steps; by name for some quantities; None keeps to the budget.
        budget: gradients spent on measuring, as a share of those spent on training.

    Raises:
        ValueError: for a cadence below 1 or a budget outside (0, 1].

    Attributes:
        origin: step of the first measurement; None before it.
        paces: of each quantity that is measured, by name.
        advance: gradients that may be spent at once: those of `ADVANCE` steps of training, and of one measurement of
            what the user named, if that is more.
        step_cost: gradients that a whole step of training takes: one, and more on a small network.
        spent: gradients of all measurements that were started.
    """

    def __init__(self, every_n_steps: EveryNSteps = None, budget: float = 0.05):
        self.every_n_steps = check_every_n_steps(every_n_steps)
        self.budget = number("budget", budget, above=0, most=1, instead=": a share of the training cost")
        self.paces: dict[str, Pace] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.origin: int | None = None
        self.advance, self.spent, self.step_cost = ADVANCE, 0.0, 1.0
        self._headline: str | None = None
        self.paces.clear()
        self._readings: list[float] = []
        self._asked: tuple[int, float, tuple[str, ...]] | None = None
        self._observed: int | None = None
        self._missed: set[str] = set()
        self._forget_quiet()

    def _forget_quiet(self) -> None:
        """Forget until when nothing is due at a nearness to the edge: something has changed."""
        self._quiet = (math.nan, -math.inf)

    @property
    def headline(self) -> str | None:
        """Name of the quantity whose Courant number is followed; None without one."""
        return self._headline

    @headline.setter
    def headline(self, name: str | None) -> None:
        if name != self._headline:
            self._headline = name
            self._forget_quiet()

    def postpone(self, name: str, step: int) -> None:
        """Let a quantity wait until a step."""
        self.paces[name].postponed = step
        self._forget_quiet()

    def add(self, name: str, *, weight: float = 1.0, length: int = 1) -> None:
        """Begin to measure a quantity.

        Args:
            name: of the quantity.
            weight: its part of the budget, beside the weights of the others.
            length: steps that a measurement takes; the next does not start before its end.
        """
        every = self.every_n_steps
        self._forget_quiet()
        self.paces[name] = Pace(weight, length, every.get(name) if isinstance(every, Mapping) else every)

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
        self.paces.pop(name, None)
        self._forget_quiet()
        if self._asked is not None:
            self._asked = (*self._asked[:2], tuple(other for other in self._asked[2] if other != name))

    @property
    def follows_rate(self) -> bool:
        """Whether the learning rate that comes next has a say."""
        return any(pace.every_n_steps is None for pace in self.paces.values())

    def period(self, name: str) -> float | None:
        """Return the steps between measurements, where nothing is known of the edge; None before the price is known."""
        pace = self.paces[name]
        if pace.every_n_steps is not None:
            return float(pace.every_n_steps)
        return (
            None
            if pace.parts is None
            else max(pace.length, pace.price / rates(self.paces, self.income, self.headline, nearness(math.nan))[name])
        )

    def waiting(self) -> dict[str, str]:
        """Return why quantities have no measurement yet, by name: the budget has not paid for one."""
        reasons = {}
        for name, pace in self.paces.items():
            if pace.every_n_steps is None and not pace.count and pace.parts is not None:
                reasons[name] = (
                    f"the budget pays {pace.price:.3g} gradients for it once in {self.period(name):.0f} steps: name it "
                    f"in every_n_steps={{{name!r}: ...}} to measure it more often, or give a larger budget"
                )
        return reasons

    # -- which start -----------------------------------------------------------------------------------------------

    def starting(self, step: int, *, scheduled: float = math.nan, busy: Iterable[str] = ()) -> tuple[str, ...]:
        """Return the quantities whose measurements start at this step; the first answer for a step is final.

        Those whose price is not known yet are among them: with `priced` the answer becomes another one.

        Args:
            step: number of the optimizer step.
            scheduled: the Courant number of the learning rate that this step will use; NaN if it is not known.
            busy: quantities whose measurement is under way.
        """
        if self._asked is None or self._asked[0] != step:
            # All numbers here are the same on all processes. If they were not, the processes would wait for each other
            # forever: this is the one place where rank 0's answer could be broadcast.
            self._missed = self._not_taken()
            self._asked = (step, scheduled, self._choose(step, scheduled, {*busy}))
        return self._asked[2]

    def _not_taken(self) -> set[str]:
        """Return what was due at the last step asked for and was not taken: `training_step` returned None."""
        return set() if self._asked is None or self._asked[0] == self._observed else {*self._asked[2]}

    def _choose(self, step: int, scheduled: float, busy: set[str]) -> tuple[str, ...]:
        fixed = [name for name, pace in self.paces.items() if pace.every_n_steps and self._is_fixed_due(name, step)]
        near = nearness(self._nearest(scheduled))
        if near == self._quiet[0] and step < self._quiet[1]:
            return tuple(fixed)
        choice = Choice(
            self.paces, self.headline, near, self.income, self.advance, self.left(step), step, self.step_cost
        )  # fmt: skip
        chosen = choice.make(busy)
        self._quiet = near, choice.until
        return (*fixed, *chosen)

    def _is_fixed_due(self, name: str, step: int) -> bool:
        pace = self.paces[name]
        if self.origin is None or (pace.postponed is not None and step >= pace.postponed):
            return True
        assert pace.every_n_steps is not None
        return (step - self.origin) % pace.every_n_steps == 0 or name in self._missed

    # -- the account -----------------------------------------------------------------------------------------------

    @property
    def income(self) -> float:
        """Gradients that each step adds to the account."""
        return self.budget * self.step_cost

    def left(self, step: int) -> float:
        """Return the gradients that may be spent at a step."""
        return self.income * (step - (step if self.origin is None else self.origin)) + self.advance - self.spent

    def _nearest(self, scheduled: float) -> float:
        """Return the largest known Courant number: too early costs a measurement, too late an alarm."""
        mean = sum(self._readings) / len(self._readings) if self._readings else math.nan
        courants = [courant for courant in (mean, *self._readings[-1:], scheduled) if not math.isnan(courant)]
        return max(courants, default=math.nan)

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
        self._forget_quiet()
        for name, gradients in parts.items():
            self.paces[name].parts, self.paces[name].is_stale = dict(gradients), False
        promised = [name for name in {*named} & {*parts} if not self.paces[name].count]
        for name in promised:
            self.paces[name].is_promised = True
        together = union(parts[name] for name in promised)
        self.spent, self.step_cost = self.spent + counting, step_cost
        self.advance = max(self.advance, ADVANCE * step_cost, sum(together.values()) + counting)
        if self._asked is not None:
            step, scheduled, names = self._asked
            fresh = self._choose(step, scheduled, {*self.paces} - {*names})
            self._asked = (step, scheduled, fresh)

    def observed(self, step: int) -> None:
        """Take note that what starts at this step can be measured; the account begins with the first such step."""
        self.origin, self._observed = step if self.origin is None else self.origin, step

    def started(self, step: int, names: Iterable[str]) -> None:
        """Charge the measurements that start at this step; what several of them spend on the same counts once."""
        self._forget_quiet()
        account = Spending(self.left(step))
        for name in names:
            pace = self.paces[name]
            pace.start(step)
            if pace.every_n_steps is None:
                self.spent += account.beside(pace)
                account.choose(name, pace)

    def restart(self, name: str) -> None:
        """Begin a measurement anew at the next step, as it was interrupted."""
        self.postpone(name, 0)

    def read(self, courant: float) -> None:
        """Add a new reading of the Courant number."""
        if not math.isnan(courant):
            self._readings = [*self._readings, courant][-RECENT:]

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and names only."""
        return {
            "origin": self.origin, "spent": self.spent, "advance": self.advance, "step_cost": self.step_cost,
            "readings": list(self._readings),
            "observed": self._observed, "paces": {name: pace.state_dict() for name, pace in self.paces.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with this cadence's own settings.

        A quantity that had a fixed pace and has none now begins anew, as its price was never found out.
        """
        self._forget_quiet()
        self.origin, self.spent, self.advance = state["origin"], state["spent"], state["advance"]
        self.step_cost = state["step_cost"]
        self._readings, self._asked, self._observed = list(state["readings"]), None, state["observed"]
        for name, pace in self.paces.items():
            saved = Pace()
            if name in state["paces"]:
                saved.load_state_dict(state["paces"][name])
            if pace.every_n_steps is not None or saved.parts is not None:
                pace.load_state_dict(saved.state_dict())
        if not self.spent and all(pace.every_n_steps is None for pace in self.paces.values()):
            self.origin = None
