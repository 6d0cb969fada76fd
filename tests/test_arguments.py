"""Whatever a constructor is given: a ValueError that names the argument, or an object that works."""

import math
import warnings

import pytest
import torch
from harness import Model, fit
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.quantities import REGISTRY

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.sampled_from([40, 50, 10**6]), st.floats(),
    st.text(max_size=5),
    st.sampled_from(["all", "summary", "top", "auto", "exact", "loss", "iid", "default", "1GB"]), st.just([]),
)  # fmt: skip
MONITOR = (
    "quantities", "every_n_steps", "budget", "window", "average", "sub_batch", "log_layers", "max_memory",
    "time_limit", "seed",
)  # fmt: skip
STOP = ("monitor", "threshold", "patience", "min_steps", "confirm", "limit")
QUANTITIES = {
    "sharpness": ("method", "bounded"),
    "courant_step": ("readings", "check_every"),
    "critical_sharpness": ("second_loss", "batches", "tolerance", "check_every"),
    "spectral_norm": (),
    "residual_cfl": ("samples", "h"),
    "mean_square_stability": ("rows", "outputs", "replacement", "most_rows"),
    "sgd_stability": ("probes", "outputs", "sampling", "chains", "steps", "horizon", "moments", "most_rows"),
    "lyapunov": ("window", "average", "method"),
    "lyapunov_trajectory": ("k", "transient", "window", "method"),
    "clarke_profile": ("samples", "eps", "vertices", "most"),
    "clarke_training": ("horizon", "eps", "vertices", "most"),
    "secant_ratio": ("method",),
    "proximal_step": ("steps", "method"),
    "batch_sharpness": ("rtol", "most", "method"),
    "dissipation": ("length", "energies", "reference", "state"),
    "sgd_law": ("probes", "reference", "products", "method", "most_rows"),
    "spectral_density": ("probes", "steps", "method"),
    "robustness": ("samples", "size"),
    "leave_one_out": ("samples", "window", "method"),
    "signal_propagation": ("samples", "method"),
    "numerics": (),
    "stability_profile": ("horizon", "directions", "noise", "samples", "probes", "bounds", "method"),
}


def made(kind, arguments):
    """The object; None where it was refused by name."""
    try:
        return kind(**arguments)
    except ValueError as error:
        assert any(f"{name}=" in str(error) or f"{name} " in str(error) for name in arguments), error
        return None


def some(names):
    return st.dictionaries(st.sampled_from(names), ANYTHING, max_size=3) if names else st.just({})


@settings(max_examples=300, deadline=None)
@given(some(MONITOR))
def test_stability_monitor(arguments):
    monitor = made(StabilityMonitor, arguments)
    if monitor is not None:
        assert monitor.monitor.wants(0) and monitor.monitor.keys
        monitor.load_state_dict(monitor.state_dict())


@settings(max_examples=300, deadline=None)
@given(some(STOP))
def test_stop_on_instability(arguments):
    stop = made(StopOnInstability, arguments)
    if stop is not None:
        stop.load_state_dict(stop.state_dict())


@pytest.mark.parametrize("name", REGISTRY)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_quantities(name, data):
    quantity = made(REGISTRY[name], data.draw(some(QUANTITIES[name])))
    if quantity is not None:
        assert quantity.prepare + quantity.window >= 1
        assert getattr(quantity, "method", "auto") in ("auto", "exact", "finite_difference")
        quantity.load_state_dict(quantity.state_dict())


@settings(max_examples=12, deadline=None)
@given(some(tuple(name for name in MONITOR if name != "quantities")), some(STOP[1:]))
def test_what_is_accepted_trains_and_changes_nothing(arguments, rule):
    monitor, stop = made(StabilityMonitor, arguments), made(StopOnInstability, rule | {"limit": None})
    if monitor is None or stop is None:
        return
    stop.threshold = math.inf  # a rule may well stop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = [list(fit(Model, *ours, max_steps=4).model.parameters()) for ours in ([], [monitor, stop])]
    assert all(map(torch.equal, *weights))
