"""Where no law of scaling holds, and at the ends of runs: every number is right, or NaN with a reason."""

import math

import pytest
import torch
from problems import close, dense_hessian, freeze, random, seeded, take
from scaling import SAMPLES, Law, Loss, batches, copied, factors, optimizer_of, probes_of, read, task_of, unit_of
from torch import nn

from lsp_callbacks import SecantRatio, Unmeasurable
from lsp_callbacks.functional import (
    UpdateRule,
    batch_sharpness,
    critical_lr,
    excess_kurtosis,
    fit_noise,
    gradient_noise,
    loss_condition_lower,
    reduced_modes,
    stability_diagram,
)
from lsp_callbacks.linalg import from_matrix, norm, unit
from lsp_callbacks.operators.curvature.stability_threshold import stability_threshold
from lsp_callbacks.operators.network.signal_sizes import signal_sizes
from lsp_callbacks.operators.trajectory.proximal import flat_parameters, update
from lsp_callbacks.operators.trajectory.update_rules import root, slope_of_root
from lsp_callbacks.quantities import REGISTRY
from lsp_callbacks.step.flat import displaced

f32, f64 = torch.float32, torch.float64


class Classes(Loss):
    """Cross-entropy of a tanh network with biases: nothing about it is homogeneous."""

    def criterion(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)


def classes(weights, inputs, dtype):
    net = seeded(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), seed=3)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(weights)
    return Classes(net, inputs * random(SAMPLES, 2, seed=1), torch.arange(SAMPLES) % 3).to(dtype)


def truths(task):
    """Of the whole batch, by dense matrices in float64."""
    twin = task.double() if task.x.dtype == f64 else copied(task, torch.optim.SGD(task.parameters(), lr=0.1), f64)[0]
    H = dense_hessian(twin)
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(twin(), list(twin.parameters()))])
    values, (first, last) = torch.linalg.eigvalsh(H), (twin.net[0].weight, twin.net[2].weight)
    jacobians = torch.autograd.functional.jacobian(lambda x: twin.net(x).sum(0), twin.x).movedim(1, 0)
    norms = [torch.linalg.matrix_norm(w.detach(), 2) for w in (first, last)]
    return {
        ("sharpness", "top"): values[-1],
        ("sgd_law", "smoothness"): values.abs().max(),
        ("sgd_law", "strong_convexity"): values[0],
        ("batch_sharpness", "batch_sharpness"): g @ H @ g / (g @ g),
        ("spectral_norm", "spectral_norm_max"): max(norms),
        ("spectral_norm", "spectral_log_sum"): sum(norms).new_tensor([n.log() for n in norms]).sum(),
        ("signal_propagation", "condition_max"): max(torch.linalg.cond(w.detach()) for w in (first, last)),
        ("stability_profile", "sigma_x/net.2"): torch.linalg.matrix_norm(jacobians, 2).max(),
        ("robustness", "robustness_prediction"): torch.linalg.matrix_norm(jacobians, 2).max(),
    }


SETTINGS = {
    "batch_sharpness": {"rtol": 1e9, "most": 8, "method": "exact"},
    "sgd_law": {"probes": SAMPLES, "products": 40},
    "robustness": {"samples": SAMPLES},
    "stability_profile": {"horizon": 2, "directions": 2, "samples": SAMPLES, "probes": SAMPLES, "bounds": 0},
}


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize(
    "weights, inputs", [(1e-6, 1e3), (1e-3, 1.0), (1.0, 1e-6), (1.0, 1.0), (3.0, 1e-3), (4.0, 1e-6)]
)
def test_cross_entropy_against_dense_matrices(weights, inputs, dtype):
    task = classes(weights, inputs, dtype)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    found = truths(task)
    top = stability_threshold(freeze(task, optimizer), steps=40, tol=1e-6)
    close(
        top.sharpness / found["sgd_law", "smoothness"],
        found.pop(("sharpness", "top")) / found["sgd_law", "smoothness"],
        1e-3,
    )
    close(top.courant / (0.05 * top.sharpness), 1.0, 1e-6)
    for name in {name for name, _ in found}:
        metric = REGISTRY[name](**SETTINGS.get(name, {}))
        for step in range(metric.prepare + (8 if name == "batch_sharpness" else metric.window) + 2):
            metric.update(
                freeze(task, optimizer, step=step, captures_inputs=metric.captures_inputs, probes=probes_of(task))
            )
            if metric.complete:
                break
        values = metric.compute()
        for key, truth in ((key, truth) for (other, key), truth in found.items() if other == name):
            value, residual = values[f"stability/{key}"], values.get(f"stability/{key}_residual", torch.zeros(()))
            size = max(abs(truth), found["sgd_law", "smoothness"] if "convexity" in key else 0)
            assert abs(value - truth) <= 0.05 * size + residual, (key, float(value), float(truth))


# -- the ends of runs ----------------------------------------------------------------------------------------------

#: Those without random draws, whose numbers in two types are of the same vectors.
EXACT = (
    "spectral_norm", "residual_cfl", "sharpness", "batch_sharpness", "signal_propagation", "robustness", "secant_ratio",
    "clarke_profile", "proximal_step", "leave_one_out",
)  # fmt: skip
#: What the type itself decides: ranks, and derivatives that saturate to 0 in it.
OF_ITS_TYPE = ("condition", "explanation")
LARGEST = {f32: 1e15, f64: 1e30}


def train(task, optimizer, steps, *, largest=math.inf):
    """Until the weights would be larger than ``largest``, or the loss no number."""
    for step, rows in zip(range(steps), batches()):
        before = {name: p.detach().clone() for name, p in task.named_parameters()}
        take(optimizer, task(rows))
        top = max(float(p.abs().max()) for p in task.parameters())
        if not (top <= largest and math.isfinite(float(task(rows)))):
            with torch.no_grad():
                for name, p in task.named_parameters():
                    p.copy_(before[name])
            return step
    return steps


def ended(end, model, kind, dtype=f32):
    law = Law("loss", 1.0)
    task = task_of(model, law, dtype)
    if end == "converged":  # to rounding: the targets are in reach
        with torch.no_grad():
            task.y.copy_(1.3 * task.net(task.x))
    if end == "zero":
        with torch.no_grad():
            for p in task.parameters():
                p.zero_()
    if end == "zero head":
        with torch.no_grad():
            task.net[-1].weight.zero_()
    optimizer = optimizer_of(kind, task, factors(law, model, kind))
    if end == "converged":
        optimizer.param_groups[0]["weight_decay"] = 0.0
        train(task, optimizer, 1000)
    if end == "diverged":
        optimizer.param_groups[0]["lr"] *= 40 if kind in ("sgd", "momentum") else 1e12
        train(task, optimizer, 400, largest=LARGEST[dtype])
    return task, optimizer


RUNS = {"tanh": "momentum", "relu": "adamw", "linear": "sgd"}
SHORT = {("converged", "linear"), ("diverged", "tanh"), ("zero", "relu"), ("zero head", "tanh")}
ENDS = [
    pytest.param(end, model, marks=() if (end, model) in SHORT else pytest.mark.slow)
    for end in ("converged", "diverged", "zero", "zero head")
    for model in RUNS
]


@pytest.mark.parametrize("end, model", ENDS)
def test_a_number_in_float32_is_that_of_float64_at_the_same_weights_or_none(end, model):
    task, optimizer = ended(end, model, RUNS[model])
    for name in EXACT:
        # Few products from a start whose noise is drawn in the type are estimates, each with an error bar of its own.
        how = {"bounded": True} if name == "sharpness" else {}
        try:
            truth = read(name, *copied(task, optimizer, f64), method="exact", **how)
            found = read(name, *copied(task, optimizer), **how)
        except Unmeasurable as error:
            assert len(str(error)) > 20
            continue
        for key, value in truth.items():
            unit_ = unit_of(name, key)
            if any(word in key for word in OF_ITS_TYPE) or unit_.free or unit_.beside:
                continue
            if math.isnan(found.get(key, math.nan)) or found[key] == value:
                continue
            uncertain = sum(abs(found.get(key + end, 0.0)) for end in ("_error", "_residual"))
            size = max(abs(value), 1.0 if unit_.logs or "gain" in key else 0.0)
            # Beside a relative error: single samples' gradients that are rounding, and secants with their error.
            slack = 0.05 * size + 2 * uncertain + (3 * found["stability/secant_error"] if name == "secant_ratio" else 0)
            slack += 0.1 * size if name == "leave_one_out" and end == "converged" else 0
            assert abs(found[key] - value) <= slack, (name, key, found[key], value)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_gradient_descent_that_diverges_is_seen(dtype, kind):
    """On a linear model the Hessian is that of the start, however far the weights have gone."""
    task, optimizer = ended("diverged", "linear", kind, dtype)
    assert max(float(p.abs().max()) for p in task.parameters()) > 1e9
    for p in optimizer.param_groups:
        p["weight_decay"] = 0.0
    top = stability_threshold(freeze(task, optimizer, lambda: task(slice(0, 2))), steps=40, tol=1e-6)
    x = task.x[:2].double()
    bordered = torch.cat([x, torch.ones(2, 1, dtype=f64)], 1)
    close(top.sharpness, torch.linalg.eigvalsh(bordered.T @ bordered / 2)[-1], 1e-3)
    assert kind == "adam" or float(top.courant) > 1  # Adam's preconditioner grows with the gradient


# -- numbers far from 1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_of_float32_numbers_whose_squares_are_none(scale):
    v = scale * random(2, 5, seed=1).to(f32)
    close(norm(v, -1) / scale, torch.linalg.vector_norm(v.double() / scale, dim=-1), 1e-6)
    close(norm(v) / scale, torch.linalg.vector_norm(v.double() / scale), 1e-6)
    close(unit(v).double().square().sum(-1), torch.ones(2), 1e-5)
    assert not unit(torch.zeros(2, 5)).any() and unit(v).dtype == f32


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_critical_rates_are_in_units_of_the_curvature(scale):
    z = random(6, 4, seed=2)
    gram, rule = z @ z.T, UpdateRule(momentum=0.5, weight_decay=0.05, decoupled_decay=0.1)
    how = {"batch_size": 2, "chains": 2, "steps": 60, "tol": 1e-4}
    scaled = UpdateRule(momentum=0.5, weight_decay=0.05 * scale, decoupled_decay=0.1 * scale)
    one, other = (
        critical_lr(reduced_modes(gram), rule=rule, **how),
        critical_lr(reduced_modes(scale * gram), rule=scaled, **how),
    )
    close(scale * other.value / one.value, 1.0, 2e-3)
    close(scale * other.mean_square / one.mean_square, 1.0, 1e-3)
    few = {"batch_sizes": [2], "chains": 2, "steps": 30}
    first = stability_diagram(reduced_modes(gram), lrs=torch.tensor([0.01, 0.1], dtype=f64), rule=rule, **few)
    second = stability_diagram(
        reduced_modes(scale * gram), lrs=torch.tensor([0.01, 0.1], dtype=f64) / scale, rule=scaled, **few
    )
    close(second.lyapunov, first.lyapunov, 1e-3)


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_moments_whose_powers_leave_float64(scale):
    values = random(50, seed=3)
    close(excess_kurtosis(scale * values)[0], excess_kurtosis(values)[0], 1e-9)
    pairs = torch.stack([random(9, seed=4).abs() + 1, random(9, seed=5).abs() + 1], 1)
    one, other = batch_sharpness(pairs), batch_sharpness(scale**2 * pairs)
    close(other.ratio_of_means_error, one.ratio_of_means_error, 1e-9)
    z = random(5, 3, seed=6)
    one, other = gradient_noise(z @ z.T + 4), gradient_noise(scale**2 * (z @ z.T + 4))
    for name in ("variance", "variance_error", "signal"):
        close(getattr(other, name) / scale**2, getattr(one, name), 1e-9)
    close(torch.stack([other.scale, other.lower, other.upper]), torch.stack([one.scale, one.lower, one.upper]), 1e-9)
    d, v = random(6, seed=7).square(), 2 + random(6, seed=8).square()
    one, other = fit_noise(d, v, 0.1 * v), fit_noise(scale * d, scale**2 * v, 0.1 * scale**2 * v)
    close(other.sigma_0_squared_error / scale**2, one.sigma_0_squared_error, 1e-9)
    close(other.sigma_1_squared_error / scale, one.sigma_1_squared_error, 1e-9)


def test_a_constant_has_no_kurtosis_at_any_size():
    for value in (0.0, 1e-90, 1.0, 1e90):
        assert excess_kurtosis(torch.full((8,), value, dtype=f64))[0].isnan()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_signals_and_conditions_in_float32_keep_their_range(scale):
    H = torch.diag(torch.tensor([9.0, 1.0, 0.5]))
    g = torch.tensor([0.01, 1.0, 1.0])
    close(loss_condition_lower(from_matrix(H), scale * g), loss_condition_lower(from_matrix(H), g), 1e-4)
    task = task_of("tanh", Law("loss", scale), f32)
    found, plain = signal_sizes(freeze(task)), signal_sizes(freeze(task_of("tanh", Law("loss", 1.0), f32)))
    for one, other in zip(found.layers, plain.layers):
        close(one.back / scale, other.back, 1e-5)


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_the_root_of_a_second_moment_has_no_least_size(dtype):
    """Nor has its derivative, which is written down: nothing differentiates the root itself."""
    nu = torch.tensor([0.0, 1e-44, 1e-40, 1.0], dtype=dtype)
    close(root(nu) / nu.sqrt().clamp_min(1e-30), [0.0, 1.0, 1.0, 1.0], 1e-6)
    leaf = nu[1:].clone().requires_grad_()
    (slope,) = torch.autograd.grad(leaf.sqrt().sum(), leaf)
    close(slope_of_root(nu) / torch.cat([nu.new_ones(1), slope]), [0.0, 1.0, 1.0, 1.0], 1e-6)


# -- steps that drown in rounding ----------------------------------------------------------------------------------


def secant_in_float64(task, optimizer):
    """Along the step that the float32 parameters really take."""
    snapshot = freeze(task, optimizer)
    before = flat_parameters(snapshot)
    with displaced(list(task.parameters()), update(snapshot), 1.0):
        taken = flat_parameters(snapshot) - before
    twin, _ = copied(task, optimizer, f64)
    gradient = lambda: torch.cat([g.reshape(-1) for g in torch.autograd.grad(twin(), list(twin.parameters()))])  # noqa: E731
    start = gradient()
    with displaced(list(twin.parameters()), taken, 1.0):
        end = gradient()
    return float((end - start).norm() / taken.norm())


@pytest.mark.parametrize("model", ["tanh", "linear"])
def test_the_error_of_a_secant_holds_and_a_secant_that_drowns_is_none(model):
    refused = covered = 0
    for rate in (1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1):
        for steps in (0, 60, 400):  # from a start to rounding
            task = task_of(model, Law("loss", 1.0), f32)
            with torch.no_grad():
                task.y.copy_(1.3 * task.net(task.x))
            optimizer = torch.optim.SGD(task.parameters(), lr=0.5)
            for _ in range(steps):
                take(optimizer, task())
            optimizer.param_groups[0]["lr"] = rate
            try:
                metric = SecantRatio(method="exact")
                metric.update(freeze(task, optimizer))
            except Unmeasurable as error:
                assert "rounding" in str(error) or "moves no parameter" in str(error)
                refused += 1
                continue
            values = {key: float(value) for key, value in metric.compute().items()}
            defect = abs(values["stability/secant"] - secant_in_float64(task, optimizer))
            assert defect <= values["stability/secant_error"] + 1e-6 * values["stability/secant"]
            covered += 1
    assert refused > 3 and covered > 5
