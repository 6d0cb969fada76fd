import json

import pytest
import support as support_matrix
import torch

torch.set_num_threads(1)

#: Files of closed forms that take a few seconds together; beside them, tests of every quantity are marked one by one.
QUICK = {
    "test_activations", "test_architecture", "test_batch", "test_batch_sharpness", "test_clarke", "test_courant_source",
    "test_depth", "test_depth_profile", "test_dissipation", "test_double_backward", "test_error_policy",
    "test_first_fault", "test_frozen_preconditioner", "test_functional", "test_gram_matrix", "test_graph",
    "test_lipschitz", "test_losses", "test_monitor", "test_new_quantity", "test_numerics", "test_observer",
    "test_measurements_under_way", "test_probes", "test_replay", "test_residual", "test_robbins_monro", "test_secant",
    "test_sgd_law",
    "test_signal_propagation", "test_snapshot", "test_spectral_norm", "test_step_by_differences",
    "test_stop_gradients", "test_training_profile", "test_verdict",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in QUICK and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)


def pytest_addoption(parser):
    parser.addoption("--support-matrix", metavar="FILE", help="write what the contract suite has measured, as JSON")


def pytest_configure(config):
    if (file := config.getoption("--support-matrix")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(support_matrix.Matrix(file))


@pytest.fixture
def support(record_property):
    """Record a row of the support matrix: axis, name, place in it, what became of each quantity, the path."""

    def record(axis, name, order, results, path=""):
        row = {"axis": axis, "name": name, "order": order, "results": results, "path": path}
        record_property("support", json.dumps(row))

    return record
