"""Several processes: no place at which one may fail hangs the others, and the curves are those of the joined batch."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import two_ranks
from harness import Model, bits, data, fit, same
from launch_ranks import launched
from two_ranks import WORLD

from lsp_callbacks import StabilityMonitor, StopOnInstability, Unmeasurable
from lsp_callbacks.callbacks.run_facts import sharded, unsupported
from lsp_callbacks.quantities import PRESETS, REGISTRY
from lsp_callbacks.step.ranks import Ranks

ALIKE = {"error": ("RuntimeError", "no memory"), "unsupported": ("Unsupported", "not here")}
FAILED = {
    "error": ("Unmeasurable", "on rank {} of 2: RuntimeError: no memory"),
    "unsupported": ("Unsupported", "on rank {} of 2: not here"),
}
#: Runs without and with our callbacks.
TWINS = {
    "forward plain": "forward",
    "backward plain": "backward",
    "plain": "smooth",
    "game plain": "game",
    "conv plain": "conv",
    "communicates plain": "communicates",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes have found, by rank; a deadlock ends in the time limit."""
    return launched("two_ranks", tmp_path_factory.mktemp("ranks"))


def alone(make, *quantities, loader, steps, **settings):
    """The curves of one process."""
    monitor = StabilityMonitor(list(quantities), **settings)
    fit(make, monitor, loader=loader, max_steps=steps)
    return {key: (curve.steps, curve.values) for key, curve in monitor.history.items()}


def close(own, twin, tolerance=1e-5):
    assert own.keys() == twin.keys() and len(own) > 3
    for key in own:
        assert own[key][0] == twin[key][0], key
        assert own[key][1] == pytest.approx(twin[key][1], rel=tolerance, abs=1e-9, nan_ok=True), key


# -- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAILED)
@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    "place", ["before", "in 0", "after 0", "in 1", "after 1", "swallowed", "catches", "quiet", "masks"]
)
def test_a_failure_anywhere_is_everybodys(found, place, who, kind):
    results = [own["rounds"][place, who, kind] for own in found]
    for rank, (result, healthy) in enumerate(results):
        name, text = ALIKE[kind] if len(who) == WORLD else FAILED[kind]
        own = {"error": "RuntimeError", "unsupported": "Unsupported"}[kind]
        cause = "NoneType"
        if rank in who and (len(who) < WORLD or place == "masks"):
            cause = "KeyError" if place == "masks" else own
        assert result == (name, text.format(who[0]), cause)
        assert healthy == [1.0]


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("place", ["astray", "more"])
def test_two_paths_are_noticed(found, place, who):
    for own in found:
        result, healthy = own["rounds"][place, who, "error"]
        if len(who) == WORLD:  # all take the same one
            assert result == [1.0, 8.0]
        else:
            assert result[0] == "Unmeasurable" and "different paths" in result[1]
        assert healthy == [1.0]


def test_exchanges(found):
    for own in found:
        assert own["rounds"]["first"] == {"rank": 0} and own["rounds"]["gather"] == [0, 1]
        assert own["rounds"]["any"] == [False, True, True, True]
        assert own["rounds"]["nested"] == [1.0, 8.0]
        half = own["rounds"]["half"]
        assert half.dtype == torch.bfloat16 and half.tolist() == [1.25, 1.25]


def test_losses_are_exchanged_every_fifth_step_and_are_the_same_on_all(found):
    """A step without a loss in one process has that of the other, one without any is left out."""
    first, second = (own["rounds"]["losses"] for own in found)
    assert repr(first) == repr(second)
    steps = [[step for step, *_ in known] for known, *_ in first]
    assert steps == [[], [], [], [], [0, 1, 2, 4], [], [], [], [], [5, 6, 7, 8, 9], [], [], [10, 11]]
    losses = {step: (loss, left_out) for known, *_ in first for step, loss, left_out in known}
    assert math.isnan(losses[6][0]) and losses.pop(6)[1]
    assert losses == {step: (step + 0.5 * (step != 2), False) for step in (0, 1, 2, 4, 5, 7, 8, 9, 10, 11)}
    assert [same for _, same, _ in first] == [True] * 9 + [False] * 4
    assert [calls for *_, calls in first] == [0] * 4 + [1] * 5 + [2] * 3 + [3]


def test_one_process_meets_nobody():
    ranks = Ranks.joined("cpu")
    assert ranks.world == 1
    assert ranks.together(lambda: ranks.first(lambda: 3, "a number")) == 3
    assert ranks.gather(lambda: 3, "a number") == [3] and ranks.any(lambda: True, "a question") is True
    numbers = (torch.ones(2),)
    assert ranks.mean(lambda: numbers, "numbers") is numbers
    with pytest.raises(KeyError):
        ranks.together(lambda: {}["own"])


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
def test_a_part_that_fails_leaves_the_others_alone(found, who):
    (values, absent, after), other = (own["parts"][who] for own in found)
    assert other == (values, absent, after) and after == 0.5  # the round goes on
    whole, none, _ = found[0]["parts"][()]
    key = "stability/loss_condition_lower"
    assert values == {name: value for name, value in whole.items() if name != key} and key in whole
    reason = absent["loss_condition_lower"]
    assert reason == ("" if len(who) == WORLD else f"on rank {who[0]} of 2: RuntimeError: ") + "no second derivative"
    # What only the first rank measures is absent on all for the same reason.
    assert absent == none | {"loss_condition_lower": reason} and any(name.startswith("units/") for name in none)


# -- products --------------------------------------------------------------------------------------------------------


def test_the_hessian_is_that_of_the_mean(found):
    truth = found[0]["curvature"]["truth"]
    for own in (own["curvature"] for own in found):
        for method, tolerance in (("exact", 1e-12), ("auto", 1e-5), ("finite_difference", 1e-5)):
            assert (own[method] - truth).abs().max() < tolerance * truth.abs().max(), method
            assert torch.equal(own[method], found[0]["curvature"][method])
            # Differences are not exact; otherwise its check of each product has failed.
            assert method == "exact" or not torch.allclose(own[method], truth, rtol=1e-12, atol=0)
            assert own[method, "kinked"]  # on the second process alone
        assert "on rank 1 of 2" in own["wrong"] and "could not be replayed" in own["wrong"]


# -- Lightning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain, measured", TWINS.items())
def test_training_is_the_same_to_the_last_bit(found, plain, measured):
    for own in found:
        for what in ("weights", "optimizer", "gradients", "losses", "random", "steps"):
            a, b = own[plain][what], own[measured][what]
            assert same(a, b) or bits(a) == bits(b), what  # in the second, NaN is equal to itself


@pytest.mark.parametrize("name", ["smooth", "conv", "uneven", "stopped", "communicates"])
def test_all_ranks_know_the_same(found, name):
    first, second = (own[name] for own in found)
    assert repr(first["history"]) == repr(second["history"]) and first["steps"] == second["steps"]
    ours = [{k: v for k, v in own["metrics"].items() if k.startswith("stability/")} for own in (first, second)]
    assert repr(ours[0]) == repr(ours[1])
    assert first["cadence"] == second["cadence"]
    assert (first["gram"] is None) == (second["gram"] is None)
    assert first["gram"] is None or torch.equal(first["gram"], second["gram"])
    assert not second["said"]  # one process is enough to say it


def test_curves_of_the_joined_batch(found):
    twin = alone(two_ranks.smooth, *two_ranks.quantities(), loader=two_ranks.joined(), steps=30, every_n_steps=5)
    own = found[0]["smooth"]["history"]
    assert {
        "stability/courant_sgd",
        "stability/lyapunov",
        "stability/batch_sharpness",
        "stability/alpha_x",
    } <= own.keys()
    assert "stability/residual_stiffness_max" in own and len(own["stability/sharpness"][0]) == 6
    close(own, twin)
    assert not found[0]["smooth"]["said"]


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_criterion_is_compared_with_the_loss_of_each_process(found, penalty):
    """Where it is another loss in one of them, nobody waits for that."""
    values = [own["told", penalty]["history"]["stability/courant_mean_square"][1] for own in found]
    assert repr(values[0]) == repr(values[1]) and len(values[0]) == 4
    assert all(math.isnan(v) == bool(penalty) for v in values[0])
    assert ["criterion(forward_fn" in text for text in found[0]["told", penalty]["said"]] == [True] * bool(penalty)


def test_players_of_the_joined_batch(found):
    monitor = two_ranks.game()
    fit(two_ranks.Game, monitor, loader=two_ranks.joined(), max_steps=20)
    own, twin = found[0]["game"]["history"], {key: (c.steps, c.values) for key, c in monitor.history.items()}
    assert {"stability/lyapunov_trajectory", "stability/player_courant/critic"} <= own.keys()
    close(own, twin)
    assert not found[0]["game"]["said"]


def test_a_checkpoint_does_not_cut_the_series_of_several_processes(found):
    """Those of one process at its joined batch, whether it is saved every sixth step or not."""
    ours = two_ranks.Soon(state="net", energies={"loss twice": lambda module, loss: 2 * loss})
    twin = alone(two_ranks.smooth, ours, loader=two_ranks.joined(), steps=36, every_n_steps=1)
    for own in found:
        plain, saved = own["every step"]["plain"], own["every step"]["saved"]
        assert repr(saved["history"]) == repr(plain["history"])
        assert saved["history"]["stability/dissipation"][0] == [*range(11, 36)]
        healthy = {key: curve for key, curve in saved["history"].items() if "broken" not in key}
        close(healthy, twin, 1e-4)
        # What fails on one process is left out on both, and the others go on.
        assert all(map(math.isnan, saved["history"]["stability/dissipation_of/broken"][1]))
        assert [bool(own_said) for own_said in (plain["said"], saved["said"])] == [own is found[1]] * 2


def test_a_resumed_run_of_several_processes_goes_on_from_the_last_measurement_or_begins_anew(found):
    for own in found:
        (steps, values), (plain, expected) = (
            own["every step"][name]["history"]["stability/dissipation"] for name in ("resumed", "saved")
        )
        assert steps == plain and values == pytest.approx(expected, rel=1e-6)
        seldom = {name: own["now and then"][name]["history"]["stability/dissipation"] for name in ("resumed", "saved")}
        assert seldom["saved"][0] == [11, 15, 20, 25, 30, 35] and seldom["resumed"][0] == [11, 15, 29, 30, 35]


def test_uneven_batches_an_unused_layer_and_a_failure_on_one_rank(found):
    own = found[0]["uneven"]
    with pytest.warns(UserWarning, match="out of memory"):
        twin = alone(two_ranks.FailsOnce, "sharpness", loader=two_ranks.uneven(), steps=10, every_n_steps=2)
    sharpness = own["history"]["stability/sharpness"]
    assert sharpness[0] == [0, 2, 4, 6, 8] and [math.isnan(v) for v in sharpness[1]] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert sharpness[1][:2] == pytest.approx(twin["stability/sharpness"][1][:2], rel=1e-5)
    # A failure forgets the warm start, so that the next value has another error.
    assert sharpness[1][3:] == pytest.approx(twin["stability/sharpness"][1][3:], rel=0.1)
    (said,) = own["said"]
    assert "rank 1 of 2: RuntimeError: out of memory" in said and "step 4" in said


def test_batch_statistics_and_a_sub_batch(found):
    own = found[0]["conv"]["history"]
    for key in ("sharpness", "courant_sgd", "spectral_norm_max"):
        assert own[f"stability/{key}"][1] and all(map(math.isfinite, own[f"stability/{key}"][1])), key
    assert found[0]["conv"]["gram"] is not None
    means = [own["conv"]["weights"]["net.1.running_mean"] for own in found]
    assert not torch.equal(*means)  # of the processes' own batches


def test_all_stop_at_the_step_at_which_one_process_would(found):
    monitor, stop = StabilityMonitor(["sharpness"], every_n_steps=1), StopOnInstability()
    run = fit(two_ranks.unstable, monitor, stop, loader=two_ranks.joined(), max_steps=60)
    assert stop.stop_step is not None and stop.stop_step < 59
    for own in found:
        assert own["stopped"]["steps"] == run.global_step
        assert (own["stopped"]["event"], own["stopped"]["stop"]) == (stop.event_step, stop.stop_step)


@pytest.mark.parametrize("at, stop", [(4, 5), (6, 10)])
def test_a_loss_that_is_not_finite_in_one_process_stops_all_at_one_step(found, at, stop):
    """When the losses are exchanged next: at step 0, which is measured, and at every fifth from there."""
    for own in found:
        assert own["not finite", at]["steps"] == stop + 1 and own["not finite", at]["stop"] == stop
        assert f"nan since step {at}" in own["not finite", at]["reason"]


@pytest.mark.parametrize("what, operation", [("forward", "aten.log"), ("backward", "aten.div")])
def test_the_rank_that_failed_first_is_named_on_all(found, what, operation):
    for own in found:
        fault = own[what]["fault"]
        assert (fault.step, fault.rank, fault.where, fault.operation) == (4, 1, what, operation)
        steps, values = own[what]["history"]["stability/overflow_headroom"]
        assert steps[:2] == [0, 3] and all(map(math.isfinite, values[:2]))
        assert own[what]["history"]["stability/nonfinite_step"] == ([4], [4.0])
    said = [text for text in found[0][what]["said"] if "step 4 is not finite: on rank 1" in text]
    assert len(said) == 1 and not found[1][what]["said"]


def test_a_step_that_communicates_is_refused(found):
    assert not found[0]["communicates"]["history"]
    (said,) = found[0]["communicates"]["said"]
    assert "communicates between processes" in said and "sharpness" in said and "spectral_norm" in said


#: Runs, and a part of the reason for which they are refused.
RUNS = {
    "DDP, two processes": (("smooth", "conv", "game"), None),
    "a step that communicates (SyncBatchNorm)": (("communicates",), "communicates between processes"),
}


@pytest.mark.parametrize("name", RUNS)
def test_support_of_strategies(found, name, support):
    """What the runs above ask for is measured under DDP, and refused with the reason elsewhere."""
    runs, refused = RUNS[name]
    results = {}
    for run in (found[0][run] for run in runs):
        for quantity in PRESETS["full"]:
            curves = [run["history"][key][1] for key in REGISTRY[quantity].keys if key in run["history"]]
            if curves and all(map(math.isfinite, itertools.chain(*curves))):
                results[quantity] = {"state": "measured"}
        for quantity, reason in run["skipped"].items():
            if refused and refused in reason:
                results[quantity] = {"state": "left out", "reason": reason}
    assert {result["state"] for result in results.values()} == {"left out" if refused else "measured"}, results
    assert {"spectral_norm", "sharpness"} <= results.keys()
    support("strategy", name, list(RUNS).index(name), results)


# -- strategies, by their names --------------------------------------------------------------------------------------


def strategy(*names, hook=None):
    classes = type(names[0], tuple(type(name, (), {}) for name in names[1:]), {"_ddp_comm_hook": hook})
    return classes()


@pytest.mark.parametrize(
    "names, refused",
    [
        (("FSDPStrategy",), True),
        (("DeepSpeedStrategy", "DDPStrategy"), True),
        (("Own", "ModelParallelStrategy"), False),
        (("Own", "DDPStrategy"), False),
        (("SingleDeviceStrategy",), False),
    ],
)
def test_sharded_strategies(names, refused):
    assert (sharded(SimpleNamespace(strategy=strategy(*names))) is not None) == refused


@pytest.mark.parametrize(
    "names, hook, reason", [(("Own",), None, "Own with 2 processes"), (("DDPStrategy",), len, "ddp_comm_hook")]
)
def test_updates_that_are_not_those_of_ddp(names, hook, reason):
    own = SimpleNamespace(
        strategy=strategy(*names, hook=hook), world_size=2, gradient_clip_val=None, accumulate_grad_batches=1,
        optimizers=[1],
    )  # fmt: skip
    assert reason in unsupported(own, Model())
    own.strategy = strategy("DDPStrategy")
    assert unsupported(own, Model()) is None


def test_what_is_named_and_sharded_raises(monkeypatch):
    monkeypatch.setattr("lsp_callbacks.callbacks.run_facts.sharded", lambda trainer: "in shards")
    with pytest.raises(Unmeasurable, match="spectral_norm cannot be measured: in shards"):
        fit(Model, StabilityMonitor("spectral_norm", every_n_steps=1), loader=data())
