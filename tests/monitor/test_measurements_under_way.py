"""What is measured at a step: it starts, goes on, or has waited until now."""

import pytest

from lsp_callbacks.monitor.cadence import Cadence


def begun(every=10, names="ab"):
    """Of quantities of which the first measurement has started at step 0."""
    made = Cadence(every)
    for name in names:
        made.add(name)
    assert made.starting(0) == tuple(names)
    made.observed(0), made.started(0, names)
    return made


def test_a_measurement_under_way_goes_on_at_the_next_step():
    made = begun()
    assert not made.due(1)
    made.under_way.add("a")
    assert made.due(2) and not made.starting(2)
    made.under_way.discard("a")
    assert not made.due(3)


def test_what_is_under_way_does_not_start_again():
    made = begun()
    made.under_way.add("a")
    assert made.starting(10) == ("b",)


def test_a_postponed_one_is_due_from_its_step_on():
    for every in (10, None):
        made = begun(every)
        made.priced({"a": {"pass": 1.0}, "b": {"pass": 40.0}})
        made.account.spent = 30.0  # nothing is left for the others
        made.postpone("a", 4)
        assert made.due(3) == set()
        assert [made.is_complete(2, within=steps) for steps in (1, 2)] == [True, False]
        made.account.spent = 0.0
        made.postpone("a", 4)  # what is spent changes only where something is asked anew
        assert made.starting(4) == made.starting(4) == ("a",)
        made.observed(4), made.started(4, ["a"])
        assert not made.postponed and not made.paces["b"].postponed


def test_a_state_without_windows_begins_them_anew():
    made, other = begun(names=["a", "b", "gone"]), Cadence(10)
    other.add("a"), other.add("b")
    made.under_way |= {"a", "gone"}
    made.postpone("b", 7)
    other.load_state_dict(made.state_dict(), windows=False)
    assert not other.under_way and other.postponed == {"a": 0, "b": 7} and other.starting(1) == ("a",)
    other.load_state_dict(made.state_dict(), windows=True)
    assert other.under_way == {"a"} and other.postponed == {"b": 7}


def test_what_is_broken_off_before_training_is_paid_for_as_any_other():
    made = Cadence(None)
    made.add("a"), made.add("b")
    made.interrupt()
    assert made.starting(0) == ("a", "b")  # their prices are not known yet
    made.observed(0)
    made.priced({"a": {"pass": 1.0}, "b": {"pass": 400.0}})
    assert made.starting(0) == ("a",)


@pytest.mark.parametrize("dear, first", [(16.0, 20), (40.0, 0)])
def test_what_a_little_dearer_measurement_brings_waits_for_it(dear, first):
    """Sharpness (12 of an advance of 15) and the exponent that aligns with it: 4 gradients later both, not one of them.

    Beside what costs far more, it does not wait.
    """
    made = Cadence(None)
    made.add("part", weight=0.1), made.add("whole", weight=0.2)
    made.starting(0)
    made.observed(0)
    made.priced({"part": {"edge": 12.0}, "whole": {"edge": 12.0, "window": dear - 12.0}})
    started = next((step, names) for step in range(100) if (names := made.starting(step)))
    assert started[0] == first
    assert {*started[1]} == ({"part", "whole"} if dear < 24 else {"part"})
