"""Training with the callbacks is, to the last bit, training without them."""

import math
from functools import partial

import pytest
import torch
from harness import (
    GRADIENT_CHANGED,
    LEFT_OUT,
    MEASURED,
    REFUSED,
    STOPPED,
    Model,
    Target,
    finite,
    mlp,
    unchanged,
    with_and_without,
)
from torch import nn

from lsp_callbacks import Dissipation, LyapunovTrajectory, StabilityMonitor

UPDATE = {"stability/sharpness", "stability/courant", "stability/courant_gd", "stability/lyapunov"}
#: What looks at outputs.
SAMPLES = ("mean_square_stability", "sgd_stability")
#: Losses that are no sum of criteria of outputs, each times a number.
OWN_LOSS = ("features",)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_and_unchanged(name, recwarn):
    monitor = with_and_without(MEASURED[name])
    for key in (*UPDATE, "stability/spectral_norm_max"):
        assert finite(monitor, key), key
    assert len(monitor.history["stability/sharpness"].steps) == 5
    assert ("stability/residual_stiffness_max" in monitor.history) == (name in ("residual", "transformer"))
    said = [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]
    penalised = [one for one in said if "not only through the outputs" in one]
    assert len(penalised) == (name == "features") and all("leave_one_out" in one for one in penalised)
    said = [one for one in said if one not in penalised]
    # Where the loss is not the value of one criterion, nobody can tell outputs from targets: it is said of the step's
    # own batch, and of the probes when they are there.
    assert len(said) == 2 * (name in OWN_LOSS) and all("forward_fn" in s for s in said)
    assert all(any(quantity in one for one in said) for quantity in SAMPLES if said)
    for key in ("stability/courant_sgd", "stability/courant_mean_square"):
        assert (key in monitor.history) == (name not in OWN_LOSS)
        assert name in OWN_LOSS or finite(monitor, key)


def test_quantities_of_long_runs_are_measured_and_leave_training_unchanged():
    """`lyapunov_trajectory` pushes a frame through all steps of a window, `dissipation` looks back on 60."""
    dissipation = Dissipation(reference="initial", state="net")
    monitor = StabilityMonitor(
        ["sharpness", LyapunovTrajectory(transient=5, window=40), dissipation], every_n_steps=46, strict=True
    )
    unchanged(lambda: Model(mlp(nn.Dropout(0.3)), partial(torch.optim.AdamW, lr=1e-2)), monitor, max_steps=65)
    assert monitor.history["stability/lyapunov_trajectory"].steps == [44]
    assert monitor.history["stability/dissipation"].steps == [59] and not monitor.skipped
    for key in ("lyapunov_trajectory", "dissipation", "dissipation_of/distance", "dissipation_of/state"):
        assert finite(monitor, f"stability/{key}"), key


@pytest.mark.parametrize("name", STOPPED)
def test_what_autograd_does_not_know_is_left_out_and_unchanged(name):
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(STOPPED[name])
    said = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert any("power iteration of spectral_norm" in one and "sharpness" in one for one in said)
    assert not UPDATE & {key for key in monitor.history if finite(monitor, key)} - {"stability/courant"}
    for key in ("spectral_norm_max", "courant_sgd", "courant_mean_square"):
        assert finite(monitor, f"stability/{key}"), key


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_and_unchanged(name):
    make, settings, reason = LEFT_OUT[name]
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(make, **settings)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and reason in ours[0]
    lost = UPDATE - {"stability/sharpness"}  # the curvature of the loss is known all the same
    assert not lost & monitor.history.keys() and "stability/courant_sgd" not in monitor.history
    assert finite(monitor, "stability/sharpness") and "stability/courant_gd" not in monitor.history
    assert finite(monitor, "stability/spectral_norm_max")
    assert not finite(monitor, "stability/residual_stiffness_max")  # the model has no block


@pytest.mark.parametrize("algorithm, limit", [("norm", 0.05), ("norm", 1e3), ("value", 0.01), (None, 0.05)])
@pytest.mark.parametrize("name", ["dropout", "adamw"])
def test_clipped_and_unchanged(name, algorithm, limit, recwarn):
    monitor = with_and_without(MEASURED[name], gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    for key in (*UPDATE, "stability/courant_sgd", "stability/courant_mean_square"):
        assert finite(monitor, key), key
    assert not [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", GRADIENT_CHANGED)
def test_a_changed_gradient_is_noticed_behind_the_clipping(name, algorithm):
    with pytest.warns(UserWarning, match="lsp_callbacks.*gradient"):
        monitor = with_and_without(GRADIENT_CHANGED[name], gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    # The curvature of the loss is known all the same, where the loss's own gradient was seen.
    keys = (UPDATE | {"stability/courant_gd"}) - {"stability/sharpness"}
    assert all(math.isnan(v) for key in keys & monitor.history.keys() for v in monitor.history[key].values)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_unchanged(name):
    make, reason = REFUSED[name]
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(make)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    # It looks at the loss again after the update, without a replay of the gradient before, and says what it sees.
    after = [text for text in ours if "could not measure critical_sharpness" in text]
    assert all("outside the batch" in text for text in after) and len(after) <= 1
    (said,) = (text for text in ours if text not in after)
    assert reason in said
    assert all(math.isnan(v) for curve in monitor.history.values() for v in curve.values)
    assert monitor.history


def test_a_network_that_the_step_lets_follow_is_measured_from_the_second_reading_on():
    """Replays are compared with the loss and the gradient of the step: they have moved the target as the step has."""
    with pytest.warns(UserWarning, match="copied from the next measurement on"):
        monitor = with_and_without(Target)
    for key in UPDATE | {"stability/courant_step", "stability/critical_sharpness"}:
        values = monitor.history[key].values
        assert sum(map(math.isfinite, values)) >= len(values) - 1 > 0, key
    assert math.isnan(monitor.history["stability/sharpness"].values[0])


@pytest.mark.parametrize("name", GRADIENT_CHANGED)
def test_a_changed_gradient_is_noticed(name):
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(GRADIENT_CHANGED[name])
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and "gradient" in ours[0]
    keys = (UPDATE | {"stability/courant_gd"}) - {"stability/sharpness"}
    assert all(math.isnan(v) for key in keys & monitor.history.keys() for v in monitor.history[key].values)
    assert finite(monitor, "stability/spectral_norm_max")
