"""Training with the callbacks is, to the last bit, training without them."""

import math
import random

import numpy as np
import pytest
import torch
from zoo import GRADIENT_CHANGED, LEFT_OUT, MEASURED, REFUSED, Losses, Rows, fit

from lsp_callbacks import StabilityMonitor, StopOnInstability

UPDATE = {"stability/sharpness", "stability/courant", "stability/courant_gd", "stability/lyapunov"}
#: Losses that are not the value of one criterion.
OWN_LOSS = ("metric", "counter", "appends", "sharedlist", "progress", "inplacebatch", "features", "hyperparameters")


def everything(trainer, model, losses, logger):
    """All that training leaves behind, ours excepted."""
    ours = "stability/"
    rows = [(step, {k: v for k, v in row.items() if not k.startswith(ours)}) for step, row in logger.rows]
    return {
        "weights and buffers": model.state_dict(),
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "losses": losses.losses,
        "rows": [row for row in rows if row[1]],
        "callback_metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(ours)},
        "logged_metrics": {k: v for k, v in trainer.logged_metrics.items() if not k.startswith(ours)},
        "memory": model.memory(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def with_and_without(make, **settings):
    """Trains twice from the same seed and compares; returns the monitor of the second run."""
    left = []
    monitor = StabilityMonitor("full", every_n_steps=2, window=2)
    for ours in ([], [monitor, StopOnInstability(threshold=math.inf)]):
        torch.manual_seed(3)
        model, losses, logger = make(), Losses(), Rows()
        trainer = fit(model, losses, *ours, logger=logger, log_every_n_steps=1, **settings)
        left.append(everything(trainer, model, losses, logger))
    for what in left[0]:
        assert same(left[0][what], left[1][what]), what
    return monitor


def finite(monitor, key):
    return key in monitor.history and all(map(math.isfinite, monitor.history[key].values))


@pytest.mark.parametrize("name", MEASURED)
def test_measured_and_unchanged(name, recwarn):
    monitor = with_and_without(MEASURED[name])
    for key in (*UPDATE, "stability/spectral_norm_max"):
        assert finite(monitor, key), key
    assert len(monitor.history["stability/sharpness"].steps) == 5
    assert ("stability/residual_stiffness_max" in monitor.history) == (name in ("residual", "transformer"))
    said = [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]
    # Where the loss is not the value of one criterion, nobody can tell outputs from targets.
    assert len(said) == (name in OWN_LOSS) and all("sgd_stability" in s and "forward_fn" in s for s in said)
    assert ("stability/courant_sgd" in monitor.history) == (name not in OWN_LOSS)
    assert name in OWN_LOSS or finite(monitor, "stability/courant_sgd")


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_and_unchanged(name):
    make, settings, reason = LEFT_OUT[name]
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(make, **settings)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and reason in ours[0]
    assert not UPDATE & monitor.history.keys() and "stability/courant_sgd" not in monitor.history
    assert finite(monitor, "stability/spectral_norm_max")
    assert finite(monitor, "stability/residual_stiffness_max") == (name == "accumulate")


@pytest.mark.parametrize("algorithm, limit", [("norm", 0.05), ("norm", 1e3), ("value", 0.01), (None, 0.05)])
@pytest.mark.parametrize("name", ["dropout", "adamw"])
def test_clipped_and_unchanged(name, algorithm, limit, recwarn):
    monitor = with_and_without(MEASURED[name], gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    for key in (*UPDATE, "stability/courant_sgd"):
        assert finite(monitor, key), key
    assert not [w for w in recwarn if "lsp_callbacks" in str(w.message)]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", GRADIENT_CHANGED)
def test_a_changed_gradient_is_noticed_behind_the_clipping(name, algorithm):
    with pytest.warns(UserWarning, match="lsp_callbacks.*gradient"):
        monitor = with_and_without(GRADIENT_CHANGED[name], gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    assert all(math.isnan(v) for key in UPDATE & monitor.history.keys() for v in monitor.history[key].values)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_unchanged(name):
    make, reason = REFUSED[name]
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(make)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and reason in ours[0]
    assert all(math.isnan(v) for curve in monitor.history.values() for v in curve.values)
    assert monitor.history


@pytest.mark.parametrize("name", GRADIENT_CHANGED)
def test_a_changed_gradient_is_noticed(name):
    with pytest.warns(UserWarning) as caught:
        monitor = with_and_without(GRADIENT_CHANGED[name])
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and "gradient" in ours[0]
    assert all(math.isnan(v) for key in UPDATE & monitor.history.keys() for v in monitor.history[key].values)
    assert finite(monitor, "stability/spectral_norm_max")
