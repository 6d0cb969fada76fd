"""What is measured at a step: it starts, goes on, or has waited until now."""

from lsp_callbacks.monitor.cadence import Cadence
from lsp_callbacks.monitor.due_quantities import Schedule


def schedule(every=10):
    made = Schedule(Cadence(every))
    made.cadence.started(0)
    return made


def test_a_measurement_under_way_goes_on_at_the_next_step():
    made = schedule()
    assert not made.is_due(1)
    made.go_on("a")
    assert made.is_due(1) and made.includes("a", 1, starts=False) and not made.includes("b", 1, starts=False)
    made.begin("a")
    assert not made.is_due(2)


def test_a_postponed_one_is_due_from_its_step_on():
    made = schedule()
    made.postpone("a", 4)
    assert [made.is_due(step) for step in (3, 4, 5)] == [False, True, True]
    assert [made.is_complete(2, within=steps) for steps in (1, 2)] == [True, False]
    assert made.resume("a") and not made.resume("a") and not made.is_due(5)


def test_a_state_without_windows_begins_them_anew():
    made, other = schedule(), Schedule(Cadence(10))
    made.go_on("a"), made.go_on("gone"), made.postpone("b", 7)
    other.load_state_dict(made.state_dict(), names=["a", "b"], windows=False)
    assert not other.under_way and other.postponed == {"a": 0, "b": 7}
    other.load_state_dict(made.state_dict(), names=["a", "b"], windows=True)
    assert other.under_way == {"a"} and other.postponed == {"b": 7}
