"""Each model of the zoo, with every quantity: training unchanged, finite values or a stated reason, the path told."""

import math

import pytest
from models import CASES
from zoo import data, unchanged

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.quantities import PRESETS, REGISTRY, BatchSharpness, LyapunovTrajectory, SGDStability, build

PRODUCTS = {"sharpness", "lyapunov", "lyapunov_trajectory", "batch_sharpness"}


class Short(LyapunovTrajectory):
    """Two steps, too few for an error bar."""

    window = 2

    def compute(self):
        return dict(zip(self.keys, (self.growth.mean(), self.growth.std())))


def everything():
    """The full preset, with windows that a short run completes; as a preset it leaves out what cannot be measured."""
    trajectory, batches = Short(transient=0), BatchSharpness(most=8)
    trajectory.window, batches.most = 2, 2
    short = {q.name: q for q in (trajectory, batches, SGDStability(probes=8, chains=2, steps=20))}
    settings = {"lyapunov": {"window": 1, "average": 3}}
    quantities = [short.get(name) or build(name, **settings)[0][0] for name in REGISTRY]
    monitor = StabilityMonitor(quantities, every_n_steps=1)
    monitor.monitor.named.clear()
    return monitor


def test_every_quantity_is_in_the_suite():
    assert set(everything().monitor.quantities) == set(REGISTRY) == set(PRESETS["full"])


@pytest.mark.parametrize("name", CASES)
def test_contract(name, recwarn):
    case = CASES[name]
    loader = data(shape=case.shape, **case.loader)
    callback = everything()
    unchanged(case.make, callback, loader=loader, **{"max_steps": 4} | case.trainer)
    monitor = callback.monitor

    assert {name: reason in monitor.skipped.get(name, "") for name, reason in case.left_out.items()} == dict.fromkeys(
        monitor.skipped, True
    ), monitor.skipped
    said = [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]
    reasons = [*case.left_out.values(), *case.failed.values()]
    assert len(said) == len(set(reasons)) and all(any(reason in one for one in said) for reason in reasons), said

    for quantity in monitor.quantities.values():
        if quantity.name == "residual_cfl" and not case.blocks and quantity.name not in case.failed:
            assert not any("residual_stiffness" in key for key in callback.history)
            continue
        for key in quantity.keys:
            curve = callback.history.get(key)
            if key.endswith(("_lower", "_upper")) and curve is None:  # a bound needs three windows
                continue
            assert curve is not None, key
            finite = [math.isfinite(value) for value in curve.values]
            assert not any(finite) if quantity.name in case.failed else all(finite), (key, curve.values)

    measured = set(REGISTRY) - set(case.left_out) - set(case.failed)
    assert set(monitor.paths) == measured
    allowed = {case.hessian} if isinstance(case.hessian, str) else set(case.hessian)
    assert {monitor.paths[name] for name in PRODUCTS & measured} <= allowed, monitor.paths
    if "sgd_stability" in measured:
        assert monitor.paths["sgd_stability"] == case.kernel
