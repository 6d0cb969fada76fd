"""What a measurement may take: memory predicted before it, seconds known after it."""

import gc
import math
import runpy
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from harness import Model, Rows, data, fit, mlp
from hypothesis import given
from hypothesis import strategies as st

from lsp_callbacks import Monitor, Quantity, Snapshot, StabilityMonitor, Unmeasurable
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.monitor import budget
from lsp_callbacks.monitor.budget import Seconds, check_memory, default_cap, in_bytes, measurement_memory
from lsp_callbacks.monitor.measurement import Measurement
from lsp_callbacks.operators.curvature import finite_differences
from lsp_callbacks.operators.curvature.followed_top import followed_top
from lsp_callbacks.operators.curvature.hessian import hessian, products_so_far
from lsp_callbacks.operators.footprint import Footprint, footprint, readable
from lsp_callbacks.step.batch import batch_size
from lsp_callbacks.step.room import Room

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory_is_predicted.py"
CPU = torch.device("cpu")


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [(None, None), (5, 5.0), (1e9, 1e9), ("2GB", 2e9), (" 1.5 GiB", 1.5 * 2**30), ("300", 300.0), ("7 apples", None)],
)
def test_a_cap_is_read(text, expected):
    if text == "7 apples":
        with pytest.raises(ValueError, match="max_memory='7 apples'"):
            in_bytes(text)
    else:
        assert in_bytes(text) == expected


@given(st.floats(1, 1e13))
def test_bytes_are_said_to_two_digits(count):
    assert in_bytes(readable(count).replace(",", "").replace("kB", "KB")) == pytest.approx(count, rel=0.06, abs=0.6)


def test_a_footprint_in_closed_form():
    """tanh keeps its output, each linear layer its input, cross-entropy its logarithms, labels and total weight."""
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3)), torch.randn(8, 6)
    y = torch.zeros(8, dtype=torch.long)
    found = footprint(Snapshot(0, net, replay=lambda: torch.nn.functional.cross_entropy(net(x), y)))
    assert found.parameters == 4 * (6 * 50 + 50 + 50 * 3 + 3) and found.buffers == 0
    assert found.activations == 4 * (8 * 6 + 8 * 50 + 8 * 3) + 8 * 8 + 4


@pytest.mark.parametrize(
    "model, quantities",
    [
        ("MLP", ["sharpness"]),
        ("CNN", ["sharpness"]),
        ("CNN", ["spectral_norm", "sharpness", "sgd_stability", "lyapunov"]),
        ("transformer", ["sharpness"]),
    ],
)
def test_the_peak_is_predicted_within_a_factor_of_two(model, quantities):
    """Against what torch's profiler counts."""
    predicted, measured = runpy.run_path(str(BENCHMARK))["compare"](model, quantities)
    assert measured > 3e5 and 0.5 < predicted / measured < 2.0


@pytest.mark.parametrize("quantity", ["lyapunov", "mean_square_stability"])
def test_the_peak_on_a_transformer_under_adam_is_predicted_within_a_factor_of_two(quantity):
    predicted, measured = runpy.run_path(str(BENCHMARK))["compare"]("transformer", [quantity], adam=True)
    assert measured > 3e5 and 0.5 < predicted / measured < 2.0


def test_vectors_of_one_run_of_products_do_not_wait_for_the_end_of_the_step():
    """Copies of the parameters and the last product, of differences that are shared by the quantities of a step."""
    net, x = mlp(), torch.randn(8, 6)
    loss = net(x).square().mean()
    gradient = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters()))))
    step = Snapshot(0, net, replay=lambda: net(x).square().mean(), gradient=gradient, loss=loss.detach())
    followed_top(hessian(step, method="finite_difference"), step, None, ())
    (differences,) = (
        cell.cell_contents
        for cell in hessian(step, method="finite_difference").apply.__closure__
        if isinstance(cell.cell_contents, finite_differences.Differences)
    )
    assert products_so_far(step).taken > 0 and differences.last is None and "start" not in vars(differences)


def test_what_is_too_large_is_left_out_with_the_number():
    monitor = StabilityMonitor(max_memory="20kB", every_n_steps=2)
    wide = lambda: Model(mlp(width=300))  # noqa: E731
    with pytest.warns(UserWarning, match=r"skips .*sharpness.*it would take \d+ kB beside training") as caught:
        fit(wide, monitor, max_steps=5)
    assert sum("skips " in str(w.message) for w in caught) == 1
    assert "sharpness" in monitor.monitor.skipped and "max_memory=20 kB" in monitor.monitor.skipped["sharpness"]
    assert all(not key.startswith("stability/sharp") for key in monitor.history)
    assert len(monitor.history["stability/spectral_norm_max"].steps) == 3  # small enough


def test_what_fits_is_measured_as_without_a_cap():
    free, capped = (
        StabilityMonitor("sharpness", every_n_steps=2),
        StabilityMonitor("sharpness", every_n_steps=2, max_memory="1GB"),
    )
    for monitor in (free, capped):
        fit(Model, monitor, max_steps=5)
    assert free.history == capped.history and capped.monitor.budget.predicted["sharpness"] > 0


def test_the_cap_on_the_cpu_lets_the_peak_be_half_as_much_again():
    training = Footprint(parameters=1e8, activations=2e9, buffers=0.0)
    cap = 1.5 * (4 * 1e8 + 2e9) - 4 * 1e8  # weights, gradient and moments are there all the time
    assert default_cap(training) == cap and default_cap(Footprint(1e3, 1e4, 0.0)) == 256e6
    assert default_cap(training, 3.0) == 3 * (4 * 1e8 + 2e9) - 4 * 1e8
    check_memory(cap, None, CPU, default=cap)
    with pytest.raises(Unsupported, match=r"it would take 3\.3 GB beside training, more than 3\.2 GB.*max_memory"):
        check_memory(3.3e9, None, CPU, default=cap)
    check_memory(3.3e9, 4e9, CPU, default=cap)  # what the user says


def test_counting_what_training_holds_keeps_nothing():
    """An output that its own node saves (tanh, log-softmax) would hold the graph for ever if it were packed itself."""
    net, x, outputs = torch.nn.Linear(6, 50), torch.randn(8, 6), []

    def loss():
        outputs.append(weakref.ref(out := net(x).tanh()))
        return out.log_softmax(-1).square().mean()

    assert footprint(Snapshot(0, net, replay=loss)).activations > 0
    assert outputs[0]() is None


@pytest.mark.parametrize("quantities", [["sharpness", "courant_step"], ["sharpness", "dissipation"]])
def test_nothing_of_a_measured_step_outlives_it(quantities, monkeypatch):
    """What is shared within a step refers to the step: without a collection of cycles it would stay."""
    steps, alive, measure = [], [], Measurement.measure

    def seen(self, snapshot):
        alive.extend(step for step, reference in steps if reference() is not None)  # later the loop collects, too
        steps.append((snapshot.step, weakref.ref(snapshot)))
        return measure(self, snapshot)

    monkeypatch.setattr(Measurement, "measure", seen)
    gc.disable()
    try:
        fit(Model, StabilityMonitor(quantities, every_n_steps=20), max_steps=61)
    finally:
        gc.enable()
    assert {0, 20, 40} <= {step for step, _ in steps} and not alive


def test_exact_products_do_not_replace_differences_where_their_graph_does_not_fit(monkeypatch):
    net, x = mlp().double(), torch.randn(8, 6, dtype=torch.float64)

    def lost(self, v):
        raise finite_differences.Untrusted

    monkeypatch.setattr(finite_differences.Differences, "product", lost)
    loss = net(x).square().mean()
    gradient = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters()))))
    for room, fits in ((1e3, False), (1e9, True)):
        step = Snapshot(
            0, net, replay=lambda: net(x).square().mean(), gradient=gradient, room=lambda room=room: Room(room, room)
        )
        v = torch.ones(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
        if fits:
            assert bool((hessian(step, method="finite_difference") @ v).isfinite().all())
        else:
            with pytest.raises(Unmeasurable, match=r"exact products would take .* kB beside training, more than 1 kB"):
                hessian(step, method="finite_difference") @ v


def test_what_is_too_large_for_the_default_cap_is_left_out(monkeypatch):
    for name, value in (("FLOOR", 0.0), ("MULTIPLE", 1.0), ("HEADLINE", 1.0)):  # what one forward pass takes
        monkeypatch.setattr(budget, name, value)
    monitor = StabilityMonitor("economy", every_n_steps=2)
    with pytest.warns(UserWarning, match=r"skips .*sharpness.*\(it would take .* kB beside training") as caught:
        fit(Model, monitor, max_steps=5)
    assert sum("skips" in str(w.message) for w in caught) == 1
    assert monitor.monitor.skipped.keys() == {"sharpness"} and monitor.history["stability/spectral_norm_max"].steps


def test_the_headline_number_may_take_more_than_the_others(monkeypatch):
    """Of the same size as another quantity, it is measured where that is left out."""
    monkeypatch.setattr(budget, "FLOOR", 0.0)
    monitor = StabilityMonitor(every_n_steps=2)
    for quantity in monitor.monitor.quantities.all:
        vars(quantity)["memory"] = lambda step: {
            "half of it": 1.5 * footprint(step).activations + 3 * footprint(step).parameters
        }
    with pytest.warns(UserWarning, match=r"skips .*sharpness.*above 1\.5 times that of training"):
        fit(Model, monitor, max_steps=5)
    assert "sharpness" in monitor.monitor.skipped and "mean_square_stability" not in monitor.monitor.skipped
    assert monitor.history["stability/courant_mean_square"].steps == [0, 2, 4]


def test_a_named_quantity_that_is_too_large_is_nan():
    monitor = StabilityMonitor("sharpness", max_memory=10, every_n_steps=2)
    with pytest.warns(UserWarning, match="could not measure sharpness at step 0.*it would take"):
        fit(Model, monitor, max_steps=3)
    assert all(map(math.isnan, monitor.history["stability/sharpness"].values))


def test_free_memory_of_a_device_is_the_cap_where_none_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80, 1000))
    cuda = torch.device("cuda:0")
    check_memory(100.0, None, cuda), check_memory(1e12, None, CPU), check_memory(101.0, 200.0, cuda)
    with pytest.raises(Unmeasurable, match="101 B beside training, and 100 B are free") as caught:
        check_memory(101.0, None, cuda)
    assert not isinstance(caught.value, Unsupported)  # there may be more at the next step
    with pytest.raises(Unsupported, match="max_memory=100 B"):
        check_memory(101.0, 100.0, CPU)


# -- seconds -------------------------------------------------------------------------------------------------------


def test_the_longest_parts_are_left_out_until_the_rest_fits():
    seconds = Seconds(1.0)
    for name, first, second in (("a", 0.9, 0.3), ("b", 9.0, 0.6), ("c", 2.4, 5.0), ("d", 0.03, 0.02)):
        seconds.begin(name), seconds.add(name, first, complete=True)
        seconds.begin(name), seconds.add(name, second / 2, complete=False)
        seconds.add(name, second / 2, complete=True)
    seconds.begin("a"), seconds.add("a", 7.0, complete=True)  # a hiccup of the machine
    assert [seconds.expected(name) for name in "abcd"] == pytest.approx([0.3, 0.6, 5.0, 0.02])
    reasons = seconds.too_long(["a", "b", "c", "d"])
    assert list(reasons) == ["c"] and "5.92 seconds, 5 of them" in reasons["c"] and "time_limit=1" in reasons["c"]
    assert not seconds.too_long(["a", "b", "d"]) and not Seconds(None).too_long("abcd")


def test_a_first_measurement_counts_a_third():
    seconds = Seconds(1.0)
    seconds.add("a", 2.9, complete=True), seconds.add("b", 3.1, complete=True)
    assert not seconds.too_long(["a"]) and list(seconds.too_long(["b"])) == ["b"]


def test_a_slow_quantity_ends_in_one_warning_and_training_is_unchanged():
    class Slow(Quantity):
        name, keys = "slow", ("stability/slow",)

        def cost(self, snapshot):
            return {}

        def update(self, snapshot):
            time.sleep(0.3)
            self.complete = True

        def compute(self):
            return {"stability/slow": torch.tensor(1.0)}

    monitor = StabilityMonitor(["spectral_norm", Slow()], every_n_steps=1, time_limit=0.25)
    with pytest.warns(UserWarning, match=r"skips slow \(a measurement takes 0\.3.*time_limit=0\.25") as caught:
        with_it = fit(Model, monitor, max_steps=4)
    assert sum("lsp_callbacks" in str(w.message) for w in caught) == 1
    assert monitor.history["stability/slow"].steps == [0, 1]
    assert monitor.history["stability/spectral_norm_max"].steps == [0, 1, 2, 3]
    without = fit(Model, max_steps=4)
    assert all(map(torch.equal, with_it.model.parameters(), without.model.parameters()))


# -- a sub-batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(8, 2), [torch.zeros(8, 2), torch.zeros(3)], {"name": "abc", "x": torch.zeros(5)},
        ("text", {"deep": [torch.zeros(4, 4)]}), None, "text", [], {"n": 3},
    ],
    ids=str,
)  # fmt: skip
def test_the_size_of_a_batch_is_lightnings(batch):
    from pytorch_lightning.utilities.data import extract_batch_size
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    try:
        expected = extract_batch_size(batch)
    except MisconfigurationException:
        expected = None
    assert batch_size(batch) == expected


def test_a_tensor_without_an_axis_is_no_batch():
    """Lightning takes it for a batch of one, by which exponents would be wrong."""
    assert batch_size({"temperature": torch.tensor(1.0), "x": torch.zeros(8, 2)}) == 8


@pytest.mark.parametrize("samples, said", [(3, 3.0), (100, 8.0), (None, None)])
def test_a_sub_batch_is_labelled_in_the_loggers(samples, said):
    rows, monitor = Rows(), StabilityMonitor("sharpness", every_n_steps=2, sub_batch=samples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Model, monitor, logger=rows, max_steps=3, loader=data())
    assert sum("those of a sub-batch" in str(w.message) for w in caught) == (samples is not None)
    assert set(rows.curve("stability/sub_batch").values()) == ({said} if said else set())
    assert monitor.history["stability/sharpness"].steps == [0, 2]


def test_predictions_leave_out_what_cannot_be_measured():
    monitor = Monitor(*StabilityMonitor().monitor.quantities.values())
    net = torch.nn.Linear(2, 1)
    snapshot = Snapshot(0, net, replay=lambda: net(torch.ones(3, 2)).square().mean())  # no optimizer
    assert set(measurement_memory(monitor.quantities, snapshot)) == {
        "spectral_norm",
        "residual_cfl",
        "sharpness",
        "courant_step",
    }
