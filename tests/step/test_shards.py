"""Runs whose two processes hold a shard of the parameters each: FSDP2, tensor parallel, and their modes."""

import itertools
import math
from functools import partial

import pytest
import torch
from harness import fit
from launch_ranks import launched
from torch import nn
from torch.utils.data import DataLoader
from two_ranks import BATCH, dataset, joined
from two_shards import NAMES, STEPS, AtOnce, Recomputes, Sharded, TensorParallel, Tokens, unstable, wide

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.quantities import REGISTRY
from lsp_callbacks.step.whole_copy import require_room


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return launched("two_shards", tmp_path_factory.mktemp("core"), "core")


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return launched("two_shards", tmp_path_factory.mktemp("more"), "more")


@pytest.fixture(scope="module")
def modes(tmp_path_factory):
    return launched("two_shards", tmp_path_factory.mktemp("modes"), "modes")


def untouched(before, after):
    for key in ("weights", "losses", "momentum", "random", "memory", "steps"):
        if key in before:
            assert equal(before[key], after[key]), key


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


#: An error bar of sharpness follows from the little that is left of an image beside the directions: of that,
#: differences of gradients know a few digits.
BARS = 3e-3


def close(own, twin, tolerance, *, but=()):
    names = [key for key in twin if not any(name in key for name in but)]
    assert names and set(names) <= own.keys()
    for key in names:
        assert own[key][0] == twin[key][0], key
        rel = max(tolerance, BARS) if key.endswith("_residual") else tolerance
        assert own[key][1] == pytest.approx(twin[key][1], rel=rel, abs=1e-9, nan_ok=True), key


def alone(make, names, steps=STEPS, **settings):
    """The curves of one process on the joined batch."""
    monitor = StabilityMonitor(list(names), every_n_steps=3, **settings)
    fit(make, monitor, loader=joined(), max_steps=steps)
    return {key: (curve.steps, curve.values) for key, curve in monitor.history.items()}


#: What looks at rows of the batch: of the first process alone, where each holds all weights.
ROWS = ("mean_square", "stability/courant", "collapsed")


def test_a_run_in_shards_is_untouched(core):
    for own in core:
        untouched(own["plain"], own["sharded"])


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("plain", "default"), ("plain state", "state"), ("plain loop", "loop")])
def test_other_runs_in_shards_are_untouched(more, before, after):
    for own in more:
        untouched(own[before], own[after])


def test_shards_are_measured_as_one_process(core):
    found = core[0]["sharded"]
    assert not found["skipped"] and not found["said"]
    twin = alone(Sharded, NAMES)
    assert all(any(name in key for key in twin) for name in ROWS)
    close(found["history"], twin, 1e-4, but=("gain_bound",))
    assert core[0]["sharded"]["history"] == core[1]["sharded"]["history"]


def test_the_headline_number_needs_no_copy_of_the_weights(core):
    """No room is left for one; the rows are those of the samples of both processes."""
    for own in core:
        untouched(own["plain"], own["no room"])
        assert own["no room"]["history"]["stability/mean_square_rows"][1] == [2.0 * BATCH] * 6
    name = "stability/courant_mean_square"
    close(core[0]["no room"]["history"], {name: core[0]["sharded"]["history"][name]}, 1e-12)


#: Keys of the sharpness, and of the exponent.
SHARP = ("sharpness", "sharpness_residual", "sharpness_limit", "courant_gd")
EXPONENT = ("lyapunov", "lyapunov_lower", "lyapunov_upper")
ALONG = [f"stability/{key}" for key in (*SHARP, *EXPONENT)]


def test_sharpness_and_exponent_need_no_copy_of_the_weights(core):
    """Products are passes of the sharded module, moved in place."""
    for own in core:
        for name in ("sharpness", "lyapunov"):
            assert own["no room"]["paths"][name] == "finite difference, shards"
            assert "shards" not in own["sharded"]["paths"][name]
        assert own["no room"]["history"] == core[0]["no room"]["history"]
    close(core[0]["no room"]["history"], {key: core[0]["sharded"]["history"][key] for key in ALONG}, 1e-6)
    as_alone(core[0]["no room"], alone(Sharded, ["sharpness", "lyapunov"]))


def as_alone(own, twin):
    """Values and intervals as those of one process."""
    close(own["history"], {key: twin[key] for key in ALONG if key in twin}, 1e-4)


def test_preconditioned_exponent_needs_no_copy_of_the_weights(core):
    """The formula of AdamW acts on shards number by number."""
    twin = alone(ALIKE["AdamW"], ["sharpness", "lyapunov"], steps=8)
    for own in core:
        assert own["AdamW no room"]["paths"]["lyapunov"] == "finite difference, shards"
        assert own["AdamW no room"]["history"] == core[0]["AdamW no room"]["history"]
        as_alone(own["AdamW no room"], twin)


def test_tensor_parallel_is_measured_in_place(core):
    """Biases lie whole on both processes, and weights in parts: each number counts once."""
    monitor = StabilityMonitor(["sharpness", "lyapunov"], every_n_steps=3)
    fit(lambda: TensorParallel(net=wide()), monitor, loader=DataLoader(dataset(), 2 * BATCH), max_steps=8)
    for own in core:
        assert own["tensor parallel"]["paths"]["lyapunov"] == "finite difference, shards"
        as_alone(own["tensor parallel"], {key: (c.steps, c.values) for key, c in monitor.history.items()})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["AdamW", "clipped", "kinked", "checkpointed", "HSDP", "offloaded", "tensor parallel", "two by one", "one by two"],
)
def test_shards_give_what_the_whole_weights_give(modes, name):
    for own in modes:
        untouched(own[f"{name} plain"], own[f"{name} without room"])
        found, whole = own[f"{name} without room"], own[name]["history"]
        assert all("shards" in found["paths"][quantity] for quantity in ("sharpness", "lyapunov")) and not found["said"]
        values = {key: whole[key] for key in ALONG if key in whole}
        bounds = {key: values.pop(key) for key in [*values] if key.endswith(("_lower", "_upper"))}
        close(found["history"], values, 1e-6)
        if bounds:  # wider by the error of the step's own product, which is a difference of gradients
            close(found["history"], bounds, 1e-4)
        assert found["history"] == modes[0][f"{name} without room"]["history"]


def test_shards_are_measured_as_under_ddp(core):
    close(core[0]["sharded"]["history"], {k: v for k, v in core[0]["ddp"]["history"].items() if not row(k)}, 1e-6)


def row(key):
    return any(name in key for name in ROWS)


def test_a_failure_in_a_pass_of_one_process_is_nan_on_all(core):
    fails_at_step_4(core, "forward")


def fails_at_step_4(runs, place):
    """Also in the middle of a pass, where the others wait for its part of the weights."""
    # The backward pass of a replay is needed for the sharpness alone.
    failing = ["stability/sharpness"]
    if place != "backward":
        failing += [f"stability/{name}" for name in ("courant_step", "spectral_norm_max", "courant_mean_square")]
    for own in runs:
        for key in failing:
            steps, values = own[place]["history"][key]
            assert steps == [0, 2, 4, 6] and [value != value for value in values] == [False, False, True, False], key
    said = " ".join(runs[0][place]["said"])
    assert "on rank 1 of 2: RuntimeError: out of memory" in said and not runs[1][place]["said"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "forward", "backward"])
def test_a_failure_on_one_process_is_nan_on_all_and_leaves_no_trace(more, place):
    fails_at_step_4(more, place)
    for own in more:
        untouched(own["healthy"], own[place])


@pytest.mark.slow
def test_a_failure_without_room_is_nan_on_all(more):
    for own in more:
        untouched(own["healthy"], own["backward without room"])
        for name, start in (("sharpness", 0), ("lyapunov", 1)):  # without a momentum there is no exponent
            steps, values = own["backward without room"]["history"][f"stability/{name}"]
            assert steps == [start, 2, 4, 6] and [value != value for value in values] == [False, False, True, False]


@pytest.mark.slow
def test_a_loop_of_ones_own_is_measured_alike(core, more):
    own = more[0]["loop"]["history"]
    assert {"stability/sharpness", "stability/courant", "stability/lyapunov"} <= own.keys()
    steps = core[0]["sharded"]["history"]["stability/sharpness"][0]
    assert own["stability/sharpness"][0][: len(steps)] == steps[: len(own["stability/sharpness"][0])]
    for key in ("stability/sharpness", "stability/courant_step", "stability/critical_sharpness", "stability/courant"):
        both = [history[key][1] for history in (own, core[0]["sharded"]["history"])]
        count = min(map(len, both))
        assert count > 3 and both[0][:count] == pytest.approx(both[1][:count], rel=1e-4), key


@pytest.mark.slow
def test_the_defaults_measure_shards(more):
    found = more[0]["default"]
    assert not found["skipped"] and not found["said"] and found["stops"] == more[1]["default"]["stops"]
    assert all(value == value for value in found["history"]["stability/courant"][1])


@pytest.mark.slow
def test_both_processes_stop_at_the_same_step(more):
    first, second = (own["stopped"] for own in more)
    ((stop, event),) = first["stops"]
    assert first["stops"] == second["stops"] and first["steps"] == second["steps"] == stop + 1 < 90
    assert event is not None and first["history"]["stability/courant"][1][0] > 1
    assert first["history"] == second["history"]


@pytest.mark.slow
def test_a_step_without_a_measurement_communicates_nothing(more):
    for plain, measured in (own["collectives"] for own in more):
        extra = [b - a for a, b in zip(plain, measured, strict=True)]
        assert min(plain) > 0 and extra[0] > 20 and extra[8] > 20
        assert {*extra[2:8], *extra[10:]} == {0}  # an exponent takes the step after its alignment, too


@pytest.mark.slow
def test_shards_stop_at_the_step_of_one_process(more):
    """By the sharpness of each step; the defaults read the headline number less often from shards."""
    ((stop, event),) = more[0]["stopped by sharpness"]["stops"]
    alone = StopOnInstability()
    fit(unstable, StabilityMonitor(["sharpness"], every_n_steps=1), alone, loader=joined(), max_steps=90)
    assert stop is not None and (stop, event) == (alone.stop_step, alone.event_step)


@pytest.mark.slow
def test_state_and_hooks_of_the_user_in_shards(more):
    seen, calls = more[0]["state"]["memory"]
    assert len(seen) == calls == 8
    for name in ("courant_step", "critical_sharpness", "spectral_norm_max"):
        values = more[0]["state"]["history"][f"stability/{name}"][1]
        assert len(values) == 4 and all(value == value for value in values)


#: Modes in which all is measured as one process does, without a shard.
ALIKE = {
    "AdamW": partial(Sharded, partial(torch.optim.AdamW, lr=0.05)),
    "HSDP": Sharded, "HSDP one replica": Sharded, "not resharded": Sharded, "checkpointed": Recomputes,
    "at once": AtOnce, "offloaded": Sharded,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *ALIKE,
        "tokens",
        "kinked",
        "clipped",
        "accumulated",
        "mixed",
        "tensor parallel",
        "two by one",
        "one by two",
        "fabric",
    ],
)
def test_modes_are_untouched(modes, name):
    for own in modes:
        untouched(own[f"{name} plain"], own[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_modes_are_measured_as_one_process(modes, name):
    # What is recomputed in the backward pass is not read from a graph, and whole weights have rows of one process.
    but = ROWS if name == "checkpointed" else ()
    close(modes[0][name]["history"], alone(ALIKE[name], NAMES, steps=8), 1e-4, but=("gain_bound", *but))


@pytest.mark.slow
def test_rows_at_tokens_of_both_processes_are_joined(modes):
    """The first reading looks at four positions of each sample, by chance others than those of one process."""
    own = modes[0]["tokens"]["history"]
    twin = alone(Tokens, ["mean_square_stability"], steps=8)
    assert own["stability/mean_square_rows"] == twin["stability/mean_square_rows"]
    values, others = (history["stability/courant_mean_square"][1] for history in (own, twin))
    assert all(0.6 < a / b < 1.6 for a, b in zip(values, others, strict=True))
    assert not modes[0]["tokens"]["said"]


@pytest.mark.slow
def test_adam_is_measured_as_under_ddp(modes):
    """The exponent, too, with the same random signs."""
    assert "stability/lyapunov" in modes[0]["AdamW ddp"]["history"]
    twin = {key: curve for key, curve in modes[0]["AdamW ddp"]["history"].items() if not row(key)}
    close(modes[0]["AdamW"]["history"], twin, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clipped", "accumulated", "fabric"])
def test_modes_that_are_measured(modes, name):
    curves = modes[0][name]["history"]
    assert not modes[0][name].get("said")
    for key in ("sharpness", "courant", "courant_step", "critical_sharpness", "spectral_norm_max"):
        values = curves[f"stability/{key}"][1]
        assert values and all(value == value for value in values), key


@pytest.mark.slow
def test_whole_weights_are_refused_in_mixed_precision(modes):
    own = modes[0]["mixed"]
    assert "MixedPrecisionPolicy rounds the weights to torch.bfloat16" in " ".join(own["said"])
    for key in ("sharpness", "lyapunov", "courant_mean_square"):
        assert all(value != value for value in own["history"][f"stability/{key}"][1]), key
    for key in ("sharpness", "lyapunov"):
        assert all(value != value for value in modes[0]["mixed without room"]["history"][f"stability/{key}"][1]), key
    assert all(value == value for value in own["history"]["stability/spectral_norm_max"][1])
    assert own["history"]["stability/critical_sharpness"][1][0] > 0  # later its own reason is rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor parallel", "one by two"])
def test_tensor_parallel_is_measured_as_one_process(modes, name):
    """Both processes take the same batch."""
    monitor = StabilityMonitor([name for name in NAMES if name != "residual_cfl"], every_n_steps=3)
    loader = DataLoader(dataset(), 2 * BATCH)
    fit(lambda: TensorParallel(net=wide()), monitor, loader=loader, max_steps=8)
    twin = {key: (curve.steps, curve.values) for key, curve in monitor.history.items()}
    close(modes[0][name]["history"], twin, 1e-4, but=ROWS)


def test_rounded_weights_have_another_loss():
    """The wrong number that the refusal avoids: the curvature of the whole weights is not that of the rounded ones."""
    torch.manual_seed(0)
    net, x = wide().float(), torch.randn(32, 6)
    rounded = [p.bfloat16().float() for p in net.parameters()]
    losses = [net(x).square().mean()]
    with torch.no_grad():
        for p, low in zip(net.parameters(), rounded):
            p.copy_(low)
    losses.append(net(x).square().mean())
    assert abs(float(losses[0] / losses[1]) - 1) > 1e-5


#: Runs, and whether they were refused.
RUNS = {"FSDP2, two processes": "sharded"}


def test_support_of_shards(core, support):
    for order, (name, run) in enumerate(RUNS.items()):
        history = core[0][run]["history"]
        results = {}
        for quantity in NAMES:
            curves = [history[key][1] for key in REGISTRY[quantity].keys if key in history]
            if curves and all(map(math.isfinite, itertools.chain(*curves))):
                results[quantity] = {"state": "measured"}
        assert {"spectral_norm", "sharpness", "mean_square_stability"} <= results.keys()
        support("strategy", name, 2 + order, results)


def test_a_shard_is_not_the_whole():
    """The wrong number that gathering avoids: norms of shards are not those of weights, nor do their squares add up."""
    weight = torch.diag(torch.tensor([3.0, 2.0])) + 1.0
    norms = [float(torch.linalg.matrix_norm(part, 2)) for part in weight.chunk(2)]
    whole = float(torch.linalg.matrix_norm(weight, 2))
    assert max(norms) < 0.95 * whole and sum(n**2 for n in norms) > 1.05 * whole**2


def test_no_room_for_the_whole_weights():
    net = nn.Linear(10, 10)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    require_room(net, sgd, 2 * 110 * 4)
    with pytest.raises(Unsupported, match="880 bytes beside its shards, more than 879"):
        require_room(net, sgd, 2 * 110 * 4 - 1)
