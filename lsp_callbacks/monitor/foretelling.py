"""How often quantities will be measured, from what they cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from lsp_callbacks.monitor.budget import COUNTING
from lsp_callbacks.monitor.cadence import Cadence

#: Gradients by quantity, and by what they are spent on.
PartsByName = Mapping[str, Mapping[str, float]]


def foretell(
    cadence: Cadence,
    prices: PartsByName,
    named: Collection[str],
    *,
    first: PartsByName = MappingProxyType({}),
    step_cost: float = 1.0,
    steps: int = 1000,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return how many measurements a run will start, and the steps between two, if nothing is known of the edge.

    Args:
        cadence: of a run that has not begun, with its quantities.
        prices: of each of them.
        named: those that the user asked for.
        first: prices of first measurements, where they are others.
        step_cost: gradients that a whole step of training takes.
        steps: of the run.

    Returns:
        Measurements and periods, by quantity.

    Example:
        >>> from lsp_callbacks.monitor.cadence import Cadence
        >>> cadence = Cadence({"a": 250}, budget=0.05)
        >>> cadence.add("a"), cadence.add("b")
        (None, None)
        >>> foretell(cadence, {"a": {"product": 9.0}, "b": {"pass": 5.0}}, [])
        ({'a': 4, 'b': 11}, {'a': 250.0, 'b': 100.0})
    """
    for step in range(steps):
        names = cadence.starting(step)
        if not names:
            continue
        cadence.observed(step)
        prices_of_start = {
            name: first.get(name, prices[name]) if not cadence.paces[name].count else prices[name] for name in names
        }
        cadence.priced(prices_of_start, named=named, counting=COUNTING * (step == 0), step_cost=step_cost)
        cadence.started(step, cadence.starting(step))
    counts = {name: pace.count for name, pace in cadence.paces.items()}
    return counts, {name: cadence.period(name) or 0.0 for name in counts}
