"""What is measured at a step: it starts, goes on, or has waited until now."""

import pytest

from lsp_callbacks.monitor.cadence import Cadence
from lsp_callbacks.monitor.due_quantities import Schedule


def schedule(every=10, names="ab"):
    """Of quantities of which the first measurement has started at step 0."""
    made = Schedule(Cadence(every))
    for name in names:
        made.cadence.add(name)
    assert made.starting(0) == tuple(names)
    made.cadence.observed(0), made.cadence.started(0, names)
    return made


def test_a_measurement_under_way_goes_on_at_the_next_step():
    made = schedule()
    assert not made.is_due(1)
    made.go_on("a")
    assert made.is_due(2) and not made.starting(2)
    made.begin("a")
    assert not made.is_due(3)


def test_what_is_under_way_does_not_start_again():
    made = schedule()
    made.go_on("a")
    assert made.starting(10) == ("b",)


def test_a_postponed_one_is_due_from_its_step_on():
    for every in (10, None):
        made = schedule(every)
        made.cadence.priced({"a": {"pass": 1.0}, "b": {"pass": 40.0}})
        made.cadence.account.spent = 30.0  # nothing is left for the others
        made.postpone("a", 4)
        assert [made.is_due(step) for step in (3,)] == [False]
        assert [made.is_complete(2, within=steps) for steps in (1, 2)] == [True, False]
        made.cadence.account.spent = 0.0
        made.postpone("a", 4)  # what is spent changes only where something is asked anew
        assert made.starting(4) == made.starting(4) == ("a",)
        made.cadence.observed(4), made.cadence.started(4, ["a"])
        assert not made.postponed and not made.cadence.paces["b"].postponed


def test_a_state_without_windows_begins_them_anew():
    made, other = schedule(names=["a", "b", "gone"]), Schedule(Cadence(10))
    other.cadence.add("a"), other.cadence.add("b")
    made.go_on("a"), made.go_on("gone"), made.postpone("b", 7)
    other.load_state_dict(made.state_dict(), names=["a", "b"], windows=False)
    assert not other.under_way and other.postponed == {"a": 0, "b": 7} and other.starting(1) == ("a",)
    other.load_state_dict(made.state_dict(), names=["a", "b"], windows=True)
    assert other.under_way == {"a"} and other.postponed == {"b": 7}


def test_what_is_broken_off_before_training_is_paid_for_as_any_other():
    made = Schedule(Cadence(None))
    made.cadence.add("a"), made.cadence.add("b")
    made.interrupt()
    assert made.starting(0) == ("a", "b")  # their prices are not known yet
    made.cadence.observed(0)
    made.cadence.priced({"a": {"pass": 1.0}, "b": {"pass": 400.0}})
    assert made.starting(0) == ("a",)


@pytest.mark.parametrize("dear, first", [(16.0, 20), (40.0, 0)])
def test_what_a_little_dearer_measurement_brings_waits_for_it(dear, first):
    """Sharpness (12 of an advance of 15) and the exponent that aligns with it: 4 gradients later both, not one of them.

    Beside what costs far more, it does not wait.
    """
    made = Schedule(Cadence(None))
    made.cadence.add("part", weight=0.1), made.cadence.add("whole", weight=0.2)
    made.starting(0)
    made.cadence.observed(0)
    made.cadence.priced({"part": {"edge": 12.0}, "whole": {"edge": 12.0, "window": dear - 12.0}})
    started = next((step, names) for step in range(100) if (names := made.starting(step)))
    assert started[0] == first
    assert {*started[1]} == ({"part", "whole"} if dear < 24 else {"part"})
