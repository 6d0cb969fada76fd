"""The stop rule on runs that fail and on healthy ones that look alarming: half an hour and more, ``pytest -m slow``."""

import os
import runpy
from pathlib import Path
from statistics import median

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def outcomes():
    if "MNIST" not in os.environ:
        pytest.skip("set MNIST to a folder with its t10k files")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        study = runpy.run_path(str(BENCHMARKS / "two_populations.py"))
    return {
        (name, seed): (problem, study["run"](problem, seed))
        for name, problem in study["PROBLEMS"].items()
        for seed in study["SEEDS"]
    }


@pytest.mark.slow
def test_ramps_are_announced_and_stopped_before_the_loss_alarm(outcomes):
    ramps = [o for (name, _), (_, o) in outcomes.items() if name.startswith("ramp")]
    assert all(o.event < o.alarm for o in ramps)
    assert median(o.alarm - o.event for o in ramps) >= 100
    # One loss went up ten-fold within a single step: there nothing could have come before the alarm.
    assert sum(o.stop < o.alarm for o in ramps) >= len(ramps) - 1 and all(o.stop <= o.alarm for o in ramps)


@pytest.mark.slow
def test_a_jump_of_the_rate_is_not_taken(outcomes):
    jumps = [o for (name, _), (_, o) in outcomes.items() if name.startswith("jump")]
    assert all(o.event < 700 and o.stop == 699 for o in jumps)


@pytest.mark.slow
def test_healthy_runs_are_not_stopped(outcomes):
    for key, (problem, outcome) in outcomes.items():
        assert problem.fails or outcome.stop is None, key
