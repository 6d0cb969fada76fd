"""The quantity: against dense products along a real run, in Lightning, and where parts of it cannot be measured."""

import copy
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from harness import Model, fit
from model_zoo import Transformer
from problems import (
    MeanSquare,
    Regression,
    close,
    f64,
    freeze,
    probes_of,
    random,
    regression,
    same,
    seeded,
    take,
    tanh_mlp,
    trajectory,
)
from torch import nn
from torch.optim import SGD, Adam

from lsp_callbacks import StabilityMonitor, StabilityProfile, Unmeasurable
from lsp_callbacks.functional import SoftThreshold
from lsp_callbacks.operators import step_jacobian, step_response
from lsp_callbacks.operators.cost import products, sample_passes
from lsp_callbacks.operators.network.outputs import output_jacobian
from lsp_callbacks.operators.network.saliency import explain
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.quantities.curvature.sharpness import alignment_memory
from lsp_callbacks.quantities.trajectory.stability_profile import PAIRS
from lsp_callbacks.step.clipping import Clipping

PREFIX = "stability/"


def values_of(metric):
    return {key.removeprefix(PREFIX): float(value) for key, value in metric.compute().items()}


def along(metric, task, optimizer, steps, **settings):
    """The steps of a real run, fed to the metric."""
    for snapshot in trajectory(task, optimizer, steps, **settings):
        metric.update(snapshot)
        yield snapshot


# Along a real run ---------------------------------------------------------------------------------------------------


RULES = {"sgd": partial(SGD, lr=0.3), "momentum": partial(SGD, lr=0.1, momentum=0.9), "adam": partial(Adam, lr=0.01)}


@pytest.mark.parametrize("rule", RULES)
def test_a_window_is_the_product_of_the_steps_that_were_taken(rule):
    task = Regression(tanh_mlp(2, 2, 1), random(6, 2, seed=1), random(6, 1))
    P = sum(p.numel() for p in task.parameters())
    optimizer = RULES[rule](task.parameters())
    metric, small = (StabilityProfile(horizon=4, directions=d, probes=6, method="exact") for d in (P, 2))
    product, first, injected = None, None, 0.0
    reach: list = []  # of the noise of each step
    for snapshot in along(metric, task, optimizer, 5, probes=probes_of(task)):
        small.update(replace(snapshot))
        J = output_jacobian(snapshot.probes, samples=6).dense()
        first = J if first is None else first
        if snapshot.step < 4:
            assert not metric.complete
            A, B = step_jacobian(snapshot, method="exact").dense(), step_response(snapshot).dense()
            product = A if product is None else A @ product
            injected += float(B[:P].square().sum()) / P
            reach = [*(A @ one for one in reach), B]
    assert metric.complete
    whole = product[:P, :P]
    found, part = values_of(metric), values_of(small)
    close(found["sigma_theta"], torch.linalg.matrix_norm(whole, 2), 1e-9)
    close(found["sigma_theta_mean_square"], whole.square().sum() / P, 1e-9)
    close(found["alpha_theta"], torch.linalg.matrix_norm(whole, 2).log() / 4, 1e-9)
    close(found["sigma_output"], torch.linalg.matrix_norm(J @ whole, 2), 1e-9)
    growth = ((J @ whole).square().sum() / first.square().sum()).log() / 8
    close(found["alpha_output"], growth, 1e-9)
    assert found["horizon"] == 4
    for bound in ("sigma_theta", "sigma_output"):
        assert part[bound] <= found[bound] + 1e-9
    driven = sum(one[:P].square().sum() for one in reach) / P
    assert abs(found["sigma_u"] - driven**0.5) < 4 * found["sigma_u_error"] < 1.5 * driven**0.5
    close(found["alpha_u"], 2 * math.log(found["sigma_u"] / injected**0.5) / 3, 0.2)


@pytest.mark.parametrize("x", [0.5, 1.9, 2.6])
def test_sgd_on_a_quadratic(x):
    """A linear layer under a squared loss: A = I - eta H at each step, H = X^T X / N."""
    data = random(12, 3, seed=1) * torch.tensor([3.0, 1.0, 0.5], dtype=f64)
    task = Regression(seeded(nn.Linear(3, 1, bias=False)), data, random(12, 1, seed=2))
    h = torch.linalg.eigvalsh(data.T @ data / 12)
    eta = float(x / h[-1])
    metric = StabilityProfile(horizon=6, directions=3, probes=6)
    for _ in along(metric, task, SGD(task.parameters(), lr=eta), 7):
        norm = task.net.weight.detach().norm().log()
    found = values_of(metric)
    factors = (1 - eta * h).abs()
    close(found["alpha_theta"], factors.max().log(), 1e-5)
    close(found["sigma_theta_mean_square"], (factors**12).mean(), 1e-5)
    driven = eta * (sum(factors ** (2 * k) for k in range(6)).mean()) ** 0.5
    assert abs(found["sigma_u"] - driven) < 5 * found["sigma_u_error"] + 1e-6  # nothing may be left to estimate
    for name in ("alpha_x", "alpha_x_median", "alpha_x_jacobian_bound", "alpha_x_norm_bound"):
        close(found[name], norm, 1e-6)
    assert "sigma_output" not in found and "alpha_output" not in found  # there are no probes


def test_the_sharp_direction_is_pushed():
    """Two random directions of 200 would not see the one that grows."""
    data = 0.1 * random(12, 200, seed=1)
    data[0, 0] = 20.0
    task = Regression(seeded(nn.Linear(200, 1, bias=False)), data, random(12, 1, seed=2))
    h = torch.linalg.eigvalsh(data.T @ data / 12)[-1]
    metric = StabilityProfile(horizon=4, directions=2, method="exact")
    for _ in along(metric, task, SGD(task.parameters(), lr=float(2.6 / h)), 5):
        pass
    close(values_of(metric)["alpha_theta"], math.log(1.6), 1e-3)


def test_below_the_edge_function_space_contracts_where_parameter_space_does_not():
    """More parameters than samples: what no sample sees neither grows nor shrinks."""
    net = tanh_mlp(2, 24, 1)
    x = random(6, 2, seed=1)
    task = MeanSquare(net, x, net(x).detach())
    metric = StabilityProfile(horizon=20, directions=6, probes=6, bounds=0)
    for _ in along(metric, task, SGD(task.parameters(), lr=0.05), 21, probes=probes_of(task)):
        pass
    found = values_of(metric)
    assert found["alpha_output"] + 3 * found["alpha_output_error"] < -0.005
    assert -0.005 < found["alpha_theta"] < 1e-6


def test_a_gap_starts_again():
    task = regression()
    metric, fresh = (StabilityProfile(horizon=2, directions=2, bounds=0) for _ in range(2))
    for snapshot in trajectory(task, SGD(task.parameters(), lr=0.1), 6):
        if snapshot.step != 2:  # which would have completed it
            metric.update(snapshot)
        if snapshot.step > 2:
            fresh.update(replace(snapshot))
        assert metric.complete == (snapshot.step == 5)
    # They started from other guesses of the sharp direction.
    close(values_of(metric)["sigma_u"], values_of(fresh)["sigma_u"], 1e-8)


class Unknown(torch.optim.Optimizer):
    """Plain descent, without a formula and an edge that is known."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


def test_an_optimizer_without_a_formula_has_no_sharp_direction():
    found = []
    for rule in (Unknown, SGD):
        task = regression()
        metric = StabilityProfile(horizon=2, directions=3, bounds=0)
        for snapshot in along(metric, task, rule(task.parameters(), lr=0.1), 3):
            metric.check(snapshot)
        found.append(values_of(metric))
        assert metric.path(snapshot).endswith("finite difference of step") == (rule is Unknown)
    unknown, sgd = found
    for name in ("sigma_theta_mean_square", "sigma_u", "alpha_u", "alpha_x"):
        close(unknown[name], sgd[name], 1e-6)
    assert unknown["sigma_theta"] <= sgd["sigma_theta"] + 1e-6


# Bounds ---------------------------------------------------------------------------------------------------------------


def measured(rule, *, task, horizon=8, directions=4, bounds=16, method="exact", samples=6, **settings):
    """What a window says, the metric, and the dense truth of the same window in float64."""
    optimizer = rule(task.parameters())
    metric = StabilityProfile(
        horizon=horizon, directions=directions, probes=samples, samples=samples, bounds=bounds, method=method
    )
    product, reach = None, []
    for snapshot in along(metric, task, optimizer, horizon + 1, probes=probes_of(task), **settings):
        if snapshot.step < horizon:
            A = update_jacobian(snapshot, method="exact").dense().double()
            B = update_response(snapshot).dense().double()
            product = A if product is None else A @ product
            reach = [*(A @ noise for noise in reach), B]
        else:
            J = output_jacobian(snapshot.probes, samples=samples).dense().double()
            G = explain(snapshot, samples=samples).by_parameters()[1].dense().double() / samples**0.5
    P = J.shape[1]
    norms = {"theta": product[:P, :P], "output": J @ product[:P, :P], "explanation": G @ product[:P, :P]}
    truth = {f"sigma_{name}": float(torch.linalg.matrix_norm(matrix, 2)) for name, matrix in norms.items()}
    truth["sigma_u"] = float(sum(noise[:P].square().sum() for noise in reach) / P) ** 0.5
    return values_of(metric), metric, truth


def between(found, truth, *, within=math.inf, error=1e-6):
    """Each truth lies in its interval, whose ends are near each other."""
    for name, value in truth.items():
        low, high = found.get(f"{name}_lower", found[name]), found[f"{name}_bound"]
        assert low * (1 - error) <= value <= high * (1 + error), name
        # Of the noise a part is known from random rows alone.
        assert low <= found[name] <= high and high <= within * low * (4 / 3 if name == "sigma_u" else 1), name


NETWORK = Regression(tanh_mlp(2, 6, 3, 1), random(6, 2, seed=1), random(6, 1, seed=2))
WINDOWS = {
    "sgd": partial(SGD, lr=0.3), "beyond the edge": partial(SGD, lr=1.0),
    "adam": partial(Adam, lr=0.01), "early adam": partial(Adam, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
}  # fmt: skip


@pytest.mark.parametrize("rule", WINDOWS)
def test_the_dense_truth_lies_between_ends_that_are_near_each_other(rule):
    """43 parameters and four directions; at Adam's first steps, too."""
    T = 4 if "adam" in rule else 8
    found, metric, truth = measured(WINDOWS[rule], task=copy.deepcopy(NETWORK), horizon=T)
    assert metric.wide == ""
    between(found, truth, within=1.5)
    close(found["alpha_theta"], math.log(found["sigma_theta"]) / T, 1e-12)
    close(found["alpha_theta_bound"], math.log(found["sigma_theta_bound"]) / T, 1e-12)
    assert found["sigma_u_error"] < 0.1 * truth["sigma_u"]


def test_differences_in_single_precision_have_the_same_ends():
    found, metric, truth = measured(WINDOWS["sgd"], task=copy.deepcopy(NETWORK).float(), method="finite_difference")
    assert metric.wide == ""
    between(found, truth, within=1.5, error=0.01)


@pytest.mark.parametrize("clipping", [None, Clipping(0.05), Clipping(0.02, "value")], ids=["", "norm", "value"])
@pytest.mark.parametrize("prox", [None, SoftThreshold(0.5)], ids=["", "prox"])
@pytest.mark.parametrize("rule", RULES)
def test_bounds_are_above_the_dense_truth(rule, clipping, prox):
    task = Regression(tanh_mlp(2, 3, 1), random(6, 2, seed=1), random(6, 1))
    settings = {"clipping": clipping, "prox": prox, "horizon": 3, "samples": 6}
    found, metric, truth = measured(RULES[rule], task=task, **settings)
    assert metric.wide == ""
    between(found, truth, within=1.5)
    close(found["alpha_theta_gap"], math.log(found["sigma_theta_bound"] / found["sigma_theta"]) / 3, 1e-9)
    close(found["alpha_u_gap"], math.log(found["sigma_u_bound"] / found["sigma_u"]), 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_random_directions_alone_have_honest_ends(seed):
    """Without an adjoint they are far apart, and hold."""
    settings = {"horizon": 3, "directions": 2, "bounds": 0, "samples": 6}
    found, metric, truth = measured(WINDOWS["beyond the edge"], task=tanh_task(seed), **settings)
    between(found, truth)
    assert metric.wide == "bounds=0" and found["sigma_theta_bound"] > 5 * found["sigma_theta"]


def tanh_task(seed):
    return Regression(tanh_mlp(2, 6, 1), random(6, 2, seed=seed), random(6, 1, seed=seed + 50))


def test_the_run_is_where_it_was_when_a_window_has_been_looked_at_again():
    """To the last bit: parameters, gradients and the optimizer's state; and the next step is the same."""
    ends = []
    for measure in (False, True):
        task = copy.deepcopy(NETWORK)
        optimizer = Adam(task.parameters(), lr=0.05)
        metric = StabilityProfile(horizon=3, directions=2, probes=6)
        for snapshot in trajectory(task, optimizer, 4, probes=probes_of(task)):
            if measure:
                versions = [p._version for p in task.parameters()]
                metric.update(snapshot)
                assert [p._version for p in task.parameters()] == versions
        assert metric.complete is measure and metric.wide == ""
        state = [x for p in task.parameters() for x in (p, p.grad, *optimizer.state[p].values())]
        ends.append([x.detach().clone() for x in state])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_steps_that_cannot_be_replayed_later_leave_wide_ends():
    """A loss that depends on what has moved on: the step's own loss tells, whether the snapshot knew it or not."""
    for told in (True, False):
        task = copy.deepcopy(NETWORK)
        optimizer = SGD(task.parameters(), lr=0.1)
        metric = StabilityProfile(horizon=3, directions=2, probes=6)
        now = [0]

        def replay(task=task, now=now):
            return (1 + now[0]) * task()

        for step in range(4):
            now[0] = step
            snapshot = freeze(task, optimizer, replay=replay, step=step, probes=probes_of(task))
            metric.update(snapshot if told else replace(snapshot, loss=None, gradient=None))
            take(optimizer, replay())
        assert metric.complete and "replay" in metric.wide
        found = values_of(metric)
        assert found["sigma_theta_bound"] > 10 * found["sigma_theta"]


def test_a_window_that_is_resumed_has_wide_ends():
    task = copy.deepcopy(NETWORK)
    metric, other = (StabilityProfile(horizon=3, directions=2, probes=6) for _ in range(2))
    for snapshot in trajectory(task, SGD(task.parameters(), lr=0.1), 4, probes=probes_of(task)):
        metric.update(snapshot)
        if snapshot.step == 1:
            other.load_vectors(copy.deepcopy(metric.vectors()))
        elif snapshot.step > 1:
            other.update(replace(snapshot))
    assert metric.complete and other.complete and "checkpoint" in other.wide and metric.wide == ""
    assert values_of(metric)["sigma_theta_bound"] < values_of(other)["sigma_theta_bound"]


def test_bounds_of_a_quadratic_are_the_truth():
    """Plain SGD on one: the steps commute."""
    data = random(12, 8, seed=1)
    task = Regression(seeded(nn.Linear(8, 1, bias=False)), data, random(12, 1, seed=2))
    h = torch.linalg.eigvalsh(data.T @ data / 12)
    eta = float(2.2 / h[-1])
    metric = StabilityProfile(horizon=4, directions=8, bounds=16, method="exact")
    for _ in along(metric, task, SGD(task.parameters(), lr=eta), 5):
        pass
    found = values_of(metric)
    assert 1.2**4 * (1 - 1e-9) <= found["sigma_theta_bound"] <= 1.2 * 1.2**4
    close(found["sigma_theta"], 1.2**4, 1e-6)
    driven = eta * sum((1 - eta * h) ** (2 * k) for k in range(4)).mean() ** 0.5
    assert found["sigma_u_lower"] <= driven * (1 + 1e-9) and driven <= found["sigma_u_bound"] * (1 + 1e-9)
    assert found["sigma_u_bound"] <= 1.5 * found["sigma_u_lower"]


def test_a_real_displacement_of_the_start_stays_below_the_bounds():
    """Predictions and explanations after training from weights that were a little off."""
    task = Regression(tanh_mlp(2, 4, 1), random(6, 2, seed=1), random(6, 1))
    start = copy.deepcopy(task)
    metric = StabilityProfile(horizon=5, directions=3, probes=6, samples=6)
    for _ in along(metric, task, SGD(task.parameters(), lr=0.3), 6, probes=probes_of(task)):
        pass
    found = values_of(metric)

    def ends(run):
        optimizer = SGD(run.parameters(), lr=0.3)
        for _ in range(5):
            take(optimizer, run())
        x = run.x.clone().requires_grad_()
        y = run.net(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    here, largest = ends(copy.deepcopy(start)), [0.0, 0.0]
    for seed in range(60):
        other = copy.deepcopy(start)
        v = random(sum(p.numel() for p in other.parameters()), seed=seed)
        with torch.no_grad():
            theta = nn.utils.parameters_to_vector(other.parameters()) + 1e-4 * v / v.norm()
            nn.utils.vector_to_parameters(theta, other.parameters())
        for i, (a, b) in enumerate(zip(ends(other), here)):
            largest[i] = max(largest[i], float((a - b).norm()) / 6**0.5 / 1e-4)
    for size, name in zip(largest, ("output", "explanation")):
        assert 0.2 * found[f"sigma_{name}"] < size <= found[f"sigma_{name}_bound"]


def test_where_the_ends_are_wide_the_reason_is_given():
    for rule, settings, reason in [
        (Unknown, {}, "by differences, which give no adjoint"), (SGD, {"bounds": 0}, "bounds=0"),
    ]:  # fmt: skip
        task = regression()
        metric = StabilityProfile(horizon=2, directions=2, **settings)
        optimizer = rule(task.parameters(), lr=0.1)
        for _ in along(metric, task, optimizer, 3, probes=probes_of(task)):
            pass
        found = values_of(metric)
        assert reason in metric.wide and metric.complete
        for name in ("sigma_theta", "sigma_output", "sigma_explanation"):
            assert 2 * found[name] < found[f"{name}_bound"] < math.inf
        assert found["sigma_u_lower"] < found["sigma_u"] < found["sigma_u_bound"] < math.inf


def test_explanations_behind_kinks_have_no_sensitivity():
    task = Regression(seeded(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))), random(6, 2), random(6, 1))
    metric = StabilityProfile(horizon=2, directions=2)
    for _ in along(metric, task, SGD(task.parameters(), lr=0.1), 3):
        pass
    found = values_of(metric)
    assert "sigma_explanation" not in found and "sigma_theta_bound" in found


def test_the_cost_is_the_same_after_a_checkpoint():
    task = regression()
    metric, resumed = (StabilityProfile(horizon=2, directions=2) for _ in range(2))
    *_, snapshot = along(metric, task, SGD(task.parameters(), lr=0.1), 3, probes=probes_of(task))
    first = resumed.cost(snapshot)
    resumed.load_state_dict(metric.state_dict())
    assert resumed.cost(snapshot) == metric.cost(snapshot) != first


# What cannot be measured --------------------------------------------------------------------------------------------


def test_outputs_that_do_not_depend_on_the_inputs_have_no_exponent():
    task = regression()
    task.net[2].weight.data.zero_()
    metric = StabilityProfile(horizon=2, directions=2)
    with torch.no_grad():
        frozen = task.net[2].weight.requires_grad_(False)
    for _ in along(metric, task, SGD([p for p in task.parameters() if p is not frozen], lr=0.1), 3):
        pass
    found = values_of(metric)
    assert math.isnan(found["alpha_x"]) and not any(map(math.isinf, found.values()))
    assert found["sigma_x/net.2"] == 0 and found["sigma_x_max"] > 0 and not math.isnan(found["alpha_theta"])


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x - x.mean(0))


def test_what_has_no_depth_loses_no_more_than_its_depth():
    """It says so once, and measures what training does."""
    task = Regression(seeded(Centred()), random(6, 2), random(6, 2, seed=1))
    metric = StabilityProfile(horizon=2, directions=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in along(metric, task, SGD(task.parameters(), lr=0.1), 6, probes=probes_of(task)):
            pass
    assert [str(w.message) for w in said if "in depth" in str(w.message)] == [
        f"stability_profile has no numbers in depth: {metric.undefined}"
    ]
    assert "one sample's input changes another's" in metric.undefined == metric.unbounded
    found = values_of(metric)
    assert not any(name.startswith(("alpha_x", "sigma_x", "depth", "sigma_explanation")) for name in found)
    assert metric.complete and {"sigma_theta_bound", "sigma_output", "sigma_u"} <= found.keys()
    assert all(map(math.isfinite, found.values()))
    other = StabilityProfile(horizon=2, directions=2)
    other.load_state_dict(metric.state_dict())
    assert same(other.compute(), metric.compute())


def test_what_overflows_is_refused():
    task = Regression(seeded(nn.Linear(2, 1)), random(6, 2), random(6, 1))
    metric, optimizer = StabilityProfile(horizon=5, directions=2), SGD(task.parameters(), lr=1e120)
    with pytest.raises(ValueError, match="finite"):
        for step in range(6):
            metric.update(freeze(task, optimizer, step=step))
            take(optimizer, task())
    assert not metric.complete


def test_a_window_that_grows_beyond_a_double_has_exponents():
    """At a minimum with a rate of 1e60: the weights stay, and six steps stretch them by 1e360."""
    net, x = seeded(nn.Linear(2, 1, bias=False)).double(), random(6, 2)
    task = Regression(net, x, net(x).detach())
    metric, optimizer = StabilityProfile(horizon=6, directions=2, probes=6), SGD(task.parameters(), lr=1e60)
    for _ in along(metric, task, optimizer, 7, probes=probes_of(task)):
        pass
    found = values_of(metric)
    top = torch.linalg.eigvalsh(x.T @ x / 6)[-1]
    assert math.isnan(found["sigma_theta"]) and not metric.wide
    for name in ("alpha_theta", "alpha_theta_mean_square", "alpha_output"):
        close(found[name], math.log(1e60 * top), 1e-2)
    rounding = 1e-7  # of products by differences of gradients in double precision
    assert found["alpha_theta"] <= math.log(1e60 * top) + rounding <= found["alpha_theta_bound"] + 2 * rounding
    assert math.isfinite(found["alpha_u"]) and found["alpha_u_gap"] > 0


def test_probes_that_cannot_be_evaluated_cost_only_the_joint_form():
    def fails():
        raise Unmeasurable("no outputs")

    task = regression()
    broken = replace(probes_of(task), parts=(fails,))
    for probes in (broken, replace(probes_of(task), full=False)):
        metric = StabilityProfile(horizon=2, directions=2)
        for _ in along(metric, task, SGD(task.parameters(), lr=0.1), 3, probes=probes):
            pass
        found = values_of(metric)
        assert metric.complete and not any("output" in name for name in found) and math.isfinite(found["sigma_theta"])


@pytest.mark.parametrize(
    "bad", [{"horizon": 1}, {"directions": 1}, {"samples": 0}, {"probes": 0}, {"bounds": -1}, {"method": "x"}]
)
def test_bad_arguments_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        StabilityProfile(**bad)


# In Lightning, and as a picture -------------------------------------------------------------------------------------


def lightning(make, steps=9):
    profile = StabilityProfile(horizon=2, directions=2, probes=8)
    monitor = StabilityMonitor(profile, every_n_steps=3)
    fit(make, monitor, max_steps=steps)
    return profile, monitor


def test_a_run_is_measured_again_and_again():
    profile, monitor = lightning(Model)
    for key in (*profile.keys, *profile.optional):
        assert monitor.history[key].steps == [2, 5, 8] and all(map(math.isfinite, monitor.history[key].values)), key
        assert StabilityProfile.KEYS[key.removeprefix(PREFIX)].meaning, key
    assert profile.unbounded == ""
    rows = [[monitor.history[f"stability/sigma_x/net.{i}"].values[k] for i in (0, 2)] for k in range(3)]
    assert [list(row) for _, row in profile._map] == rows and [step for step, _ in profile._map] == [2, 5, 8]


def test_why_there_is_no_bound_by_weights():
    profile, monitor = lightning(lambda: Model(Transformer()), steps=3)
    assert "TransformerBlock has no Lipschitz constant" in profile.unbounded
    assert not {"stability/alpha_x_norm_bound", "stability/alpha_x_norm_gap"} & monitor.history.keys()
    assert monitor.history["stability/alpha_x_jacobian_gap"].values[0] > 0


def test_cost_grows_with_what_is_asked_for():
    task = regression()
    snapshot = freeze(task, SGD(task.parameters(), lr=0.1), probes=probes_of(task))
    cheap, dear = (sum(StabilityProfile(horizon=h, directions=d).cost(snapshot).values()) for h, d in ((2, 2), (4, 4)))
    one = 1 / 3 + products(snapshot, "finite_difference", 4, tangent=True)  # pass through a step
    pushed = [T * (1 / 3 + products(snapshot, "finite_difference", k, tangent=True)) for T, k in ((2, 19), (4, 21))]
    passes = 1 + 2 * PAIRS
    assert dear - cheap == pytest.approx(pushed[1] - pushed[0] + 2 * passes * one + sample_passes(snapshot, 16, 2 * 2))
    memory = StabilityProfile().memory(snapshot)
    assert set(memory) >= {"vectors", "graph of the outputs"} and min(memory.values()) >= 0


@pytest.mark.parametrize("momentum, blocks", [(0.0, 1), (0.9, 2)])
def test_memory_holds_the_steps_and_the_bases_of_the_ends_and_that_of_the_edge(momentum, blocks):
    task = regression()
    snapshot = freeze(task, SGD(task.parameters(), lr=0.1, momentum=momentum))
    vectors = [StabilityProfile(bounds=k).memory(snapshot)["vectors"] for k in (0, 40, 80)]
    bytes_ = 8 * sum(p.numel() for p in task.parameters())
    assert vectors[2] - vectors[1] == 4 * 20 * bytes_  # of the parameters, the noise and two readers
    longer = StabilityProfile(bounds=40, horizon=9).memory(snapshot)["vectors"]
    # Of one more step: parameters, gradient, state and noise, and what its differences keep for all passes.
    assert longer - vectors[1] == (2 + blocks + 3) * bytes_
    smallest = StabilityProfile(directions=2, bounds=0).memory(snapshot)
    assert all(smallest[name] >= size for name, size in alignment_memory(snapshot, "auto").items())


def test_the_picture_has_depth_and_time():
    pytest.importorskip("matplotlib")
    profile, _ = lightning(Model)
    figure, ax = profile.plot()
    mesh = ax.collections[0].get_array()
    assert mesh.shape == (2, 3) and [t.get_text() for t in ax.get_yticklabels()] == ["net.0", "net.2"]
    close(mesh[0, 0], math.log10(profile._map[0][1][0]), 1e-12)
    assert ax.get_ylim() == (2.5, 0.5) and ax.get_xlim()[0] < 2 < 8 < ax.get_xlim()[1]
    own, _ = profile.plot(torch.tensor([[1.0, 0.0, 100.0]]), ax)
    assert own is figure and ax.collections[-1].get_array().mask[1, 0]
    profile.reset()
    with pytest.raises(ValueError, match="nothing has been measured"):
        profile.plot()


def test_a_network_that_changes_starts_a_new_map():
    profile = StabilityProfile(horizon=2, directions=2)
    for net in (tanh_mlp(2, 3, 1), tanh_mlp(2, 3, 3, 1)):
        task = Regression(net, random(6, 2), random(6, 1))
        for _ in along(profile, task, SGD(task.parameters(), lr=0.1), 3):
            pass
        assert [step for step, _ in profile._map] == [2]
        profile.load_vectors({})
    assert len(profile._map) == 1 and len(profile._map[0][1]) == 3 and same(profile.compute(), profile.compute())


def test_directions_that_all_miss_the_one_that_grows_have_no_small_error():
    from types import SimpleNamespace

    from lsp_callbacks.quantities.trajectory.profile_in_training import _mean_square_errors

    P, k, agreed = 100, 4, math.log(1.29)  # four directions that agree on 1.29, beside one that grows by 8
    profile = SimpleNamespace(steps=5, alpha_mean_square=agreed / 10, alpha_mean_square_error=0.03 / 10)
    errors = _mean_square_errors(math.log(8.0), profile, SimpleNamespace(random=k, size=P))
    assert errors["sigma_theta_mean_square_error"] == pytest.approx(math.sqrt(2 / k - 2 / P) * 8.0**2 / P)
    every = _mean_square_errors(math.log(8.0), profile, SimpleNamespace(random=P, size=P))
    assert every["sigma_theta_mean_square_error"] == pytest.approx(0.03 * 1.29)
