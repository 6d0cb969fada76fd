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
def test_runs_that_build_up_are_announced_before_the_loss_alarm(outcomes):
    building = [o for (name, _), (_, o) in outcomes.items() if name.startswith("ramp") and o.alarm is not None]
    ahead = [o.alarm - o.event for o in building if o.event is not None and o.event < o.alarm]
    assert len(ahead) >= 0.95 * len(building) and median(ahead) >= 100


@pytest.mark.slow
def test_healthy_runs_are_not_stopped(outcomes):
    for key, (_, outcome) in outcomes.items():
        assert outcome.kind != "healthy" or outcome.stop is None, key
