"""What quantities say that they cost, against counted passes; no clock."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = [("MLP", name) for name in ("mean_square_stability", "sharpness", "lyapunov")]
SHORT += [("CNN", name) for name in ("sharpness", "lyapunov")]
NETWORKS = ["MLP", "CNN", "char transformer", "ViT", "GPT-2 10 M"]
LONG = [("CNN", name) for name in ("residual_cfl", "courant_step")]
LONG += [(network, name) for network in ("char transformer", "ViT") for name in ("sharpness", "lyapunov")]
LONG += [(network, "mean_square_stability") for network in NETWORKS[1:]]


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delenv("MNIST", raising=False)
    yield runpy.run_path(str(BENCHMARKS / "costs_are_counted.py"))
    sys.modules.pop("models", None)


@pytest.mark.parametrize("network, name", [*SHORT, *(pytest.param(*c, marks=pytest.mark.slow) for c in LONG)])
def test_a_price_is_right_within_a_factor_of_one_and_a_half(counted, network, name):
    """The first measurement, and a third one, which starts from those before."""
    counts = counted["compare"](counted["TRAININGS"][network], name)
    for said, found in zip(counts.said[::2], counts.counted[::2], strict=True):
        assert 1 / 1.5 < said / found < 1.5


GPT2_MEASURES = ["spectral_norm", "residual_cfl", "mean_square_stability", "courant_step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", GPT2_MEASURES)
def test_no_default_measurement_takes_longer_than_twenty_steps_on_gpt2(counted, name):
    """124 M parameters, batch 2, T = 64, from a configuration."""
    counts = counted["compare"](counted["TRAININGS"]["GPT-2 124 M"], name, 1)
    assert not counts.skipped and len(counts.counted) == 1
    assert counts.counted[0] <= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharpness", "lyapunov"])
def test_what_does_not_fit_beside_gpt2_is_left_out_before_it_starts(counted, name):
    """Hessian products take several vectors over all parameters, 0.5 GB each; training itself has four."""
    counts = counted["compare"](counted["TRAININGS"]["GPT-2 124 M"], name, 1)
    assert "beside training" in counts.skipped and not counts.counted
