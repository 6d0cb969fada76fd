"""Full-batch descent, the control of the study of lambda along SGD, reaches its edge: ``pytest -m slow``."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_full_batch_descent_reaches_the_edge(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study = runpy.run_path(str(BENCHMARKS / "does_lambda_hover_at_zero.py"))
    problem = study["Problem"]("mlp", study["nn"].Tanh, 1.0, batch=None, squared=True, data="digits")
    courant = study["run"](problem, seed=0, steps=2000).courant
    assert courant[0] < 0.9 and all(0.9 < value < 1.1 for value in courant[-3:])
