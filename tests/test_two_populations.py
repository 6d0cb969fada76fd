"""The stop rule on runs that fail and on healthy ones that look alarming: half an hour, ``pytest -m slow``."""

import runpy
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "benchmarks" / "two_populations.py"


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(STUDY))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ramps_of_sgd_are_stopped_before_the_loss_alarm(study, seed):
    ramps = {name: p for name, p in study["PROBLEMS"].items() if p.fails and not p.momentum}
    for name, problem in ramps.items():
        outcome = study["run"](problem, seed)
        assert not outcome.end <= outcome.start, name  # it did fail
        assert outcome.event < outcome.alarm and outcome.stop < outcome.alarm, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_runs_are_not_stopped(study, seed):
    for name, problem in study["PROBLEMS"].items():
        if not problem.fails:
            outcome = study["run"](problem, seed)
            assert outcome.alarm is None and outcome.stop is None, name
