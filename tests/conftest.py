import json

import pytest
import support as support_matrix
import torch

torch.set_num_threads(1)


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
