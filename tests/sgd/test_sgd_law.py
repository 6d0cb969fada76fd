"""The law of SGD, the noise of its gradients, and the quantity, against simulation, enumeration and dense matrices."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from checkpoint_harness import Once
from harness import MOMENTUM, Model, data, fit
from lightning.fabric import Fabric
from loop_harness import cross_entropy, net
from problems import Regression, close, dense_hessian, f64, freeze, random, regression, same, take
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Monitor, ProbeSet, SGDLaw, StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import (
    PowerLaw,
    batch_variance,
    fit_noise,
    gradient_noise,
    noise_gain,
    noise_lipschitz,
    sgd_law,
)
from lsp_callbacks.functional.sgd.sgd_law import contraction_factor
from lsp_callbacks.loops import Watch, watch_fabric
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.step.criterion import evaluation

SGD = torch.optim.SGD
LAW = ("sgd_law_q", "sgd_law_eta_max", "sgd_law_floor")


# -- the law ---------------------------------------------------------------------------------------------------------


def simulated(curvature, lr, sigma_0, sigma_1, steps, chains=10_000):
    """``E ||e_t||^2`` of SGD on a quadratic with noise of exactly that variance, from ``||e||^2 = 100``."""
    generator = torch.Generator().manual_seed(0)
    e = torch.zeros(chains, len(curvature), dtype=f64)
    e[:, 0] = 10.0
    means = [100.0]
    for _ in range(steps):
        size = (sigma_0**2 + sigma_1**2 * e.square().sum(1, keepdim=True)).sqrt()
        noise = torch.randn(e.shape, generator=generator, dtype=f64) / len(curvature) ** 0.5
        e = e - lr * (curvature * e + size * noise)
        means.append(float(e.square().sum(1).mean()))
    return means


@pytest.mark.parametrize("sigma_0, sigma_1", [(0.0, 0.0), (2.0, 0.0), (0.0, 1.5), (2.0, 1.5)])
def test_with_one_curvature_the_law_is_exact(sigma_0, sigma_1):
    lr, h = 0.3, 0.8
    law = sgd_law(lr, convexity=h, smoothness=h, sigma_0_squared=sigma_0**2, sigma_1_squared=sigma_1**2)
    means = simulated(torch.full((4,), h, dtype=f64), lr, sigma_0, sigma_1, 40)
    for before, after in itertools.pairwise(means[:6]):
        close(after / before, (law.q * before + lr**2 * sigma_0**2) / before, 0.03)
    if sigma_0:
        close(means[-1] / law.floor, 1.0, 0.05)
    edge = sgd_law(law.eta_max, convexity=h, smoothness=h, sigma_1_squared=sigma_1**2)
    close(edge.q, 1.0, 1e-12)


def test_with_several_curvatures_it_is_a_bound_and_the_rate_is_cautious():
    curvature = torch.tensor([0.5, 1.0, 2.0], dtype=f64)
    law = sgd_law(0.2, convexity=0.5, smoothness=2.0, sigma_0_squared=1.0, sigma_1_squared=0.25)
    means = simulated(curvature, 0.2, 1.0, 0.5, 60)
    assert all(after <= law.q * before + 0.04 + 0.02 * before for before, after in itertools.pairwise(means))
    assert means[-1] < law.floor
    close(sgd_law(0.1, convexity=0.5, smoothness=2.0).eta_max * 2.0 / 0.5, 2 / 2.0, 1e-12)  # L / mu below 2 / L


def test_contraction_of_the_energy_does_not_bound_the_sensitivity():
    """``theta+ = theta - lr (theta + sin(k theta + u))``: q = 0.25, and neighbours part for k > 4."""
    lr, k = 0.5, 10.0
    law = sgd_law(lr, convexity=1.0, smoothness=1.0, sigma_0_squared=0.5)
    assert law.q == 0.25
    generator = torch.Generator().manual_seed(0)
    theta, energy, growth = torch.full((20_000,), 3.0, dtype=f64), [], 0.0
    for _ in range(30):
        energy.append(float(theta.square().mean()))
        phase = k * theta + 2 * math.pi * torch.rand(len(theta), generator=generator, dtype=f64)
        growth += float((1 - lr * (1 + k * phase.cos())).abs().log().mean()) / 30
        theta = theta - lr * (theta + phase.sin())
    for before, after in itertools.pairwise(energy):
        assert after == pytest.approx(0.25 * before + lr**2 * 0.5, rel=0.02)
    close(growth, 0.9163, 0.01)
    close(growth, math.log(lr * k / 2), 0.01)
    assert 0.5 * math.log(law.q) < 0 < growth


@pytest.mark.parametrize("mu, L", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_without_convexity_there_is_no_law(mu, L):
    with pytest.raises(ValueError, match="convexity="):
        sgd_law(0.1, convexity=mu, smoothness=L)


def test_above_the_rate_there_is_no_floor():
    law = sgd_law(2.0, convexity=1.0, smoothness=2.0, sigma_0_squared=1.0)
    assert law.q > 1 and math.isnan(law.floor)


def test_the_fit_of_the_noise():
    d = random(40, seed=3).square()
    noise = 0.3 * random(40, seed=4)
    plain, noisy = fit_noise(d, 2 + 0.5 * d), fit_noise(d, 2 + 0.5 * d + noise)
    close(plain.sigma_0_squared, 2, 1e-12)
    close(plain.sigma_1_squared_error, 0, 1e-6)
    design = torch.stack([torch.ones_like(d), d], 1)
    value = torch.linalg.lstsq(design, 2 + 0.5 * d + noise).solution
    residual = 2 + 0.5 * d + noise - design @ value
    errors = (residual.square().sum() / 38 * torch.linalg.inv(design.T @ design).diagonal()).sqrt()
    close(torch.stack([noisy.sigma_0_squared, noisy.sigma_1_squared]), value, 1e-10)
    close(torch.stack([noisy.sigma_0_squared_error, noisy.sigma_1_squared_error]), errors, 1e-10)
    shared = fit_noise(d, 2 + 0.5 * d, 0.1 * (2 + 0.5 * d))
    close(shared.sigma_0_squared_error, 0.2, 1e-6)
    falling, through = fit_noise(d, 5 - 0.5 * d), fit_noise(d, d.square())
    assert float(falling.sigma_1_squared) == 0
    close(falling.sigma_0_squared, (5 - 0.5 * d).mean(), 1e-12)
    assert float(through.sigma_0_squared) == 0
    close(through.sigma_1_squared, (d**3).sum() / d.square().sum(), 1e-12)
    for few in (d[:2], d.new_ones(9), d[:0]):
        assert fit_noise(few, few).sigma_0_squared.isnan()


# -- the constants of Thm 5.2 (3) ------------------------------------------------------------------------------------


def response(steps, lr, pushes):
    """The largest norm of ``theta_t`` over unit pushes in each step of ``v+ = A v - lr B u``, as scalars."""
    v = 0.0
    for a, b in zip(steps, pushes):
        v = abs(a) * v + lr * b
    return v


def test_noise_displaces_a_quadratic_by_no_more_than_the_gain_and_as_far():
    curvatures, lr, size = random(400, seed=5).abs().clamp(0.3, 1.9).tolist(), 0.9, 0.7
    bound = noise_gain(lr, convexity=0.3, smoothness=1.9) * lr * size
    assert response([1 - lr * a for a in curvatures], lr, [size] * 400) <= bound
    worst = [1 - lr * 0.3] * 400  # |1 - 0.27| is above |1 - 1.71|
    close(response(worst, lr, [size] * 400), bound, 1e-9)
    close(bound, size / 0.3, 1e-9)


def test_convexity_of_the_mean_bounds_no_sensitivity_to_noise():
    """``theta+ = theta - lr (theta + sin(k theta + u))``: Thm 5.2 (3) as printed has no constant."""
    lr, k, logs = 0.5, 10.0, []
    assert sgd_law(lr, convexity=1.0, smoothness=1.0, sigma_0_squared=0.5).q < 1
    generator = torch.Generator().manual_seed(0)
    theta = torch.zeros(2000, dtype=f64)
    phase = 2 * math.pi * torch.rand(2000, generator=generator, dtype=f64)
    log = (lr * phase.cos().abs()).log()  # d theta_1 / d u_0
    theta = theta - lr * (theta + phase.sin())
    for _ in range(40):
        phase = k * theta + 2 * math.pi * torch.rand(2000, generator=generator, dtype=f64)
        log = log + (1 - lr * (1 + k * phase.cos())).abs().log()
        theta = theta - lr * (theta + phase.sin())
        logs.append(float(log.mean()))
    close((logs[-1] - logs[9]) / 30, math.log(k / 4), 0.02)
    with pytest.raises(ValueError, match="contract"):  # the least curvature of G(., u) is 1 - k
        noise_gain(lr, convexity=1 - k, smoothness=1 + k)


@pytest.mark.parametrize(
    "lr, m, L", [(0.0, 1, 2), (1.0, 1, 2), (0.5, 0, 2), (0.5, -1, 2), (-1, 1, 2), (0.5, math.nan, 2)]
)
def test_where_no_step_need_contract_there_is_no_gain(lr, m, L):
    with pytest.raises(ValueError, match=r"convexity="):
        noise_gain(lr, convexity=m, smoothness=L)


def test_the_constant_of_the_noise_is_reached():
    g = random(6, 4, seed=6) + 3
    found = noise_lipschitz(g @ g.T)
    close(found, torch.linalg.matrix_norm(g - g.mean(0), 2), 1e-10)
    ways = random(20000, 6, seed=7)
    ways = ways - ways.mean(1, keepdim=True)
    ratios = (ways @ g).norm(dim=1) / ways.norm(dim=1)
    assert 0.9 * found < ratios.max() <= found * (1 + 1e-12)


def test_the_constants_of_a_run_with_batches_in_turn():
    """A linear model, batches of four of its three weights: the extremes over all Hessians seen."""
    task = linear(12)
    metric, optimizer = SGDLaw(probes=12, products=30), SGD(task.parameters(), lr=0.05)
    parts, spectra = [slice(0, 4), slice(4, 8), slice(8, 12)], []
    for step, rows in enumerate(parts):
        x = task.x[rows]
        spectra.append(torch.linalg.eigvalsh(x.T @ x / 4))
        probes = probes_of(task, samples=12, batch_size=4, population=12)
        metric.update(freeze(task, optimizer, lambda rows=rows: task(rows), step=step, probes=probes))
        found = {key.split("/")[1]: float(value) for key, value in metric.compute().items()}
        least, most = min(float(s[0]) for s in spectra), max(float(s[-1]) for s in spectra)
        close(found["gradient_lipschitz"], most, 1e-6)
        close(found["noise_gain"], noise_gain(0.05, convexity=least, smoothness=most), 1e-4)
    r = task.net(task.x) - task.y
    g = (r * task.x).detach()
    close(found["noise_lipschitz"], torch.linalg.matrix_norm(g - g.mean(0), 2), 1e-8)
    for other in (measured(linear(), lr=20.0, steps=1), measured(linear(), make=partial(SGD, momentum=0.5), steps=1)):
        assert "stability/noise_gain" not in other.compute() and "stability/gradient_lipschitz" in other.compute()
    assert "stability/noise_gain" not in measured(linear(2), samples=2, population=2, batch_size=1).compute()
    metric.restart()
    assert metric.curvatures.tolist() == [math.inf, 0.0, 0.0]


# -- the noise of the gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 7])
def test_the_noise_of_batches_against_all_of_them(batch):
    g = random(7, 5)
    found = gradient_noise(g @ g.T, population=7)
    mean = g.mean(0)
    batches = torch.stack([g[list(rows)].mean(0) for rows in itertools.combinations(range(7), batch)])
    truth = (batches - mean).square().sum(1).mean()
    close(batch_variance(float(found.variance), batch, 7), truth, 1e-12)
    close(found.signal, mean.square().sum(), 1e-12)
    close(found.scale, found.variance / mean.square().sum(), 1e-12)
    close(torch.stack([found.lower, found.upper]), found.scale.expand(2), 1e-9)  # all samples: nothing is unknown


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_estimates_are_unbiased_over_all_probes(n):
    g = random(7, 4, seed=1)
    truth = gradient_noise(g @ g.T, population=7)
    found = [gradient_noise(g[list(s)] @ g[list(s)].T, population=7) for s in itertools.combinations(range(7), n)]
    for name in ("variance", "signal"):
        close(torch.stack([getattr(one, name) for one in found]).mean(), getattr(truth, name), 1e-12)


@pytest.mark.parametrize("signal", [0.3, 1.0])
def test_the_bounds_of_the_noise_scale_hold(signal):
    runs, n, p = 300, 64, 8
    g = random(runs, n, p, seed=2)
    g[:, :, 0] += signal
    found = [gradient_noise(one @ one.T) for one in g]
    truth = p / signal**2
    close(sum(float(one.variance) for one in found) / runs, p, 0.02)
    close(sum(float(one.signal) for one in found) / runs, signal**2, 0.05)
    lower = sum(not float(one.lower) > truth for one in found) / runs
    upper = sum(not float(one.upper) < truth for one in found) / runs
    assert lower > 0.83 and upper > 0.83
    unknown = sum(bool(one.upper.isnan()) for one in found) / runs
    assert unknown > 0.3 if signal == 0.3 else unknown < 0.02
    error = torch.stack([one.variance_error for one in found]).mean()
    close(error / torch.stack([one.variance for one in found]).std(), 1.0, 0.15)


def test_gradients_that_tell_nothing():
    with pytest.raises(Unmeasurable, match="two at least"):
        gradient_noise(torch.ones(1, 1))
    with pytest.raises(Unmeasurable, match="not finite"):
        gradient_noise(torch.full((3, 3), torch.nan))
    zero = gradient_noise(torch.zeros(3, 3))
    assert float(zero.variance) == 0 and zero.scale.isnan() and zero.upper.isnan()
    opposed = gradient_noise(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert float(opposed.signal) == -1 and opposed.scale.isnan()


class Pixels(nn.Module):
    """Classes at each of four positions, by a convolution and a batch norm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Tanh(), nn.Conv1d(3, 3, 1))
        self.net.double().eval()
        self.x, self.y = random(5, 2, 4), torch.arange(20).view(5, 4) % 3

    def forward(self, rows=slice(None)):
        return F.cross_entropy(self.net(self.x[rows]), self.y[rows])

    def outputs(self, rows):
        y = self.y[rows]
        loss = lambda f: F.cross_entropy(f.movedim(-1, 1), y)  # noqa: E731
        return evaluation(self.net(self.x[rows]).movedim(1, -1), loss, samples=len(y))


def probes_of(task, parts=(slice(None),), samples=6, batch_size=2, population=6, outputs=None):
    outputs = outputs or (
        lambda rows: evaluation(
            task.net(task.x[rows]),
            lambda f: 0.5 * (f - task.y[rows]).square().sum(-1).mean(),
            samples=len(task.x[rows]),
        )
    )
    return ProbeSet(task, tuple(partial(outputs, rows) for rows in parts), samples, batch_size, population)


@pytest.mark.parametrize("parts", [(slice(None),), (slice(0, 2), slice(2, None))])
@pytest.mark.parametrize("make", [regression, Pixels])
def test_gradients_of_single_samples_against_one_backward_pass_each(make, parts):
    task = make()
    n = len(task.x)
    own = [torch.autograd.grad(task(slice(i, i + 1)), list(task.parameters())) for i in range(n)]
    g = torch.stack([torch.cat([p.reshape(-1) for p in one]) for one in own])
    kernel = tangent_kernel(probes_of(task, parts, n, outputs=getattr(task, "outputs", None)), outputs="loss")
    close(kernel.gram, g @ g.T, 1e-10)
    assert kernel.rows == 1


# -- the quantity ----------------------------------------------------------------------------------------------------


def linear(n=12, spread=1.0):
    """Least squares in three dimensions, with its own noise: strongly convex."""
    x = random(n, 3) * torch.tensor([1.0, 1.0, spread], dtype=f64)
    return Regression(nn.Linear(3, 1, bias=False).double(), x, random(n, 1, seed=1))


def measured(task, steps=4, lr=0.05, make=SGD, metric=None, snapshot=None, **settings):
    """The metric after some measured steps, and the snapshots."""
    metric, optimizer = metric or SGDLaw(probes=len(task.x), products=30), make(task.parameters(), lr=lr)
    settings = {"samples": len(task.x), "batch_size": 3, "population": len(task.x)} | settings
    for step in range(steps):
        metric.update(freeze(task, optimizer, step=step, probes=probes_of(task, **settings), **(snapshot or {})))
        take(optimizer, task())
    return metric


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_every_number_against_brute_force(decay):
    task = linear()
    first, truth = task.net.weight.detach().clone(), []
    metric = SGDLaw(probes=12, products=30)
    optimizer = SGD(task.parameters(), lr=0.05, weight_decay=decay)
    for step in range(5):
        truth.append(float((task.net.weight.detach() - first).square().sum()))
        metric.update(
            freeze(task, optimizer, step=step, probes=probes_of(task, samples=12, batch_size=3, population=12))
        )
        take(optimizer, task())
        if step < 2:
            assert not any(f"stability/{name}" in metric.compute() for name in (*LAW, "sigma_0_squared"))
    found = {key.split("/")[1]: float(value) for key, value in metric.compute().items()}
    spectrum = torch.linalg.eigvalsh(dense_hessian(task)) + decay
    close(found["smoothness"], spectrum[-1], 1e-6)
    close(found["strong_convexity"], spectrum[0], 1e-6)
    assert found["sgd_law_violated"] == 0

    # Distances of three numbers: each falls into a bucket of its own.
    close(metric.pairs[:, 0], truth, 1e-10)
    own = fit_noise(*metric.pairs.unbind(1))
    close(found["sigma_0_squared"], own.sigma_0_squared, 1e-12)
    law = sgd_law(
        0.05, convexity=float(spectrum[0]), smoothness=float(spectrum[-1]),
        sigma_0_squared=found["sigma_0_squared"], sigma_1_squared=found["sigma_1_squared"],
    )  # fmt: skip
    for name, value in zip(LAW, (law.q, law.eta_max, law.floor)):
        close(found[name], value, 1e-5)


def test_the_variance_is_that_of_all_batches_of_the_run():
    task = linear(6)
    metric = SGDLaw(probes=6)
    metric.update(freeze(task, SGD(task.parameters(), lr=0.1), probes=probes_of(task)))
    (whole,) = torch.autograd.grad(task(), task.net.weight)
    rows = itertools.combinations(range(6), 2)
    squares = [
        (torch.autograd.grad(task(list(pair)), task.net.weight)[0] - whole).square().sum() for pair in rows
    ]  # fmt: skip
    close(metric.compute()["stability/gradient_variance"], torch.stack(squares).mean(), 1e-10)
    full = measured(linear(6), steps=1, batch_size=6)
    assert float(full.compute()["stability/gradient_variance"]) == 0


def test_where_the_loss_is_not_convex_nothing_is_promised():
    task = regression()
    assert torch.linalg.eigvalsh(dense_hessian(task))[0] < 0
    found = measured(task, steps=4).compute()
    assert float(found["stability/sgd_law_violated"]) == 1 and float(found["stability/strong_convexity"]) < 0
    assert not any(f"stability/{name}" in found for name in LAW[1:])
    assert "stability/sigma_0_squared" in found and float(found["stability/sgd_law_q"]) >= 1


@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.3])
def test_the_factor_bounds_the_energy_of_a_scalar_step_with_noise(mu):
    """Curvatures mu and 2, noise of size ``s ||e||``: over a circle of e the mean energy is at most q."""
    lr, s = 0.2, 0.5
    q = contraction_factor(lr, convexity=mu, smoothness=2.0, sigma_1_squared=s**2)
    for angle in torch.linspace(0, 3.14, 20, dtype=torch.float64):
        e = torch.stack([angle.cos(), angle.sin()])
        mean = e - lr * torch.tensor([mu, 2.0]) * e
        assert float(mean.square().sum()) + lr**2 * s**2 <= q + 1e-12
    assert (q >= 1) == (mu <= 0 or lr >= 2 * mu / (4 + s**2))
    if mu > 0:
        assert q == sgd_law(lr, convexity=mu, smoothness=2.0, sigma_1_squared=s**2).q


def test_a_flat_direction_is_no_convexity():
    found = measured(linear(2), samples=2, population=2, batch_size=1).compute()  # two samples, three weights
    assert float(found["stability/sgd_law_violated"]) == 1


def test_a_run_that_has_not_converged_says_neither():
    task = linear(40, spread=0.05)
    found = measured(task, metric=SGDLaw(probes=40, products=2)).compute()
    assert float(found["stability/strong_convexity_residual"]) > 0
    assert "stability/sgd_law_violated" not in found and not any(f"stability/{name}" in found for name in LAW[1:])


@pytest.mark.parametrize(
    "make", [partial(SGD, momentum=0.9), torch.optim.Adam, torch.optim.AdamW, partial(SGD, maximize=True)]
)
def test_the_law_is_that_of_plain_sgd(make):
    found = measured(linear(), make=make, lr=1e-3).compute()
    assert not any(f"stability/{name}" in found for name in LAW)
    assert all(float(found[key]) == float(found[key]) for key in SGDLaw.keys)


def test_distances_go_on_after_a_checkpoint_and_from_a_file(tmp_path):
    task = linear()
    metric, other = measured(task, 3), SGDLaw(probes=12)
    other.load_state_dict(metric.state_dict())
    step = freeze(task, SGD(task.parameters(), lr=0.05), probes=probes_of(task, samples=12, population=12))
    metric.load_vectors({})
    metric.update(step), other.update(replace(step))  # products adapt to those before them on a snapshot
    assert torch.equal(metric.pairs, other.pairs) and same(metric.compute(), other.compute())
    torch.save(task.state_dict(), tmp_path / "end.pt")
    fresh = SGDLaw(probes=12, reference=tmp_path / "end.pt")
    fresh.update(step)
    assert float(fresh.pairs[0, 0]) == 0
    with pytest.raises(ValueError, match="reference="):
        SGDLaw(reference="nowhere.pt")


def test_without_probes_it_is_refused_and_with_few_it_waits():
    task = linear()
    metric = SGDLaw()
    with pytest.raises(Unmeasurable, match="ProbeSet"):
        metric.update(freeze(task, SGD(task.parameters(), lr=0.1)))
    part = ProbeSet(task, (), 0, 2, 12, full=False)
    metric.update(freeze(task, SGD(task.parameters(), lr=0.1), probes=part))
    assert not metric.complete


def test_a_run_of_lightning_tells_schedule_and_sums():
    class Fading(Model):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, PowerLaw(0.75))]

    monitor = StabilityMonitor([SGDLaw(probes=16, products=4)], every_n_steps=2)
    fit(Fading, monitor, max_steps=7)
    assert monitor.history["stability/robbins_monro"].values == [1.0] * 4
    rates = [0.1 * (1 + epoch) ** -0.75 for epoch in (0, 0, 0, 0, 0, 0, 1)]
    close(monitor.history["stability/rate_sum"].values[-1], sum(rates), 1e-12)
    close(monitor.history["stability/rate_square_sum"].values[-1], sum(r * r for r in rates), 1e-12)
    plain = StabilityMonitor([SGDLaw(probes=16, products=4)], every_n_steps=2)
    fit(lambda: Model(optimizer=MOMENTUM), plain, max_steps=3)
    assert plain.history["stability/robbins_monro"].values == [0.0] * 2


def fading(optimizer, known):
    schedule = PowerLaw(0.75)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, schedule if known else lambda t: schedule(t))


def test_a_schedule_of_unknown_form_is_read_off_its_rates(tmp_path):
    """In Lightning, step by step, and resumed in the middle."""

    class Fading(Model):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": fading(optimizer, False), "interval": "step"}]

    law = lambda: StabilityMonitor([SGDLaw(probes=16, products=4)], every_n_steps=12)  # noqa: E731
    whole, resumed, cut = law(), law(), Once(tmp_path, 50)
    fit(Fading, whole, cut, max_steps=100)
    fit(Fading, resumed, ckpt_path=cut.path, max_steps=100)
    for monitor in (whole, resumed):
        assert not {"stability/robbins_monro"} & monitor.history.keys()
        steps, values = vars(monitor.history["stability/rate_decay"]).values()
        assert steps == [72, 84, 96] and monitor.history["stability/robbins_monro_so_far"].values == [1.0] * 3
        close(values, [0.75] * 3, 0.02)
    assert whole.history["stability/rate_decay"].values == resumed.history["stability/rate_decay"].values


@pytest.mark.parametrize("kind", ["plain", "fabric"])
@pytest.mark.parametrize("known", [True, False, None])
def test_other_loops_show_their_schedulers(kind, known):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = fading(optimizer, known)
    shown = {} if known is None else {"schedulers": [scheduler] if known else scheduler}
    monitor = Monitor(SGDLaw(probes=16, products=4), every_n_steps=72)
    if kind == "plain":
        watch, module, stepper = Watch(model, optimizer, cross_entropy, monitor, **shown), model, optimizer
    else:
        run = Fabric(accelerator="cpu", devices=1)
        module, stepper = run.setup(model, optimizer)
        if known:  # made with what Fabric returned
            shown = {"schedulers": fading(stepper, True)}
        watch = watch_fabric(run, module, stepper, cross_entropy, monitor, **shown)
    while watch.step < 73:
        for batch in watch(data()):
            stepper.zero_grad()
            cross_entropy(module, batch).backward()
            stepper.step(), scheduler.step()
    if known:
        assert set(monitor.history["stability/robbins_monro"].values) == {1.0}
        assert not {"stability/rate_decay", "stability/robbins_monro_so_far"} & monitor.history.keys()
    else:
        assert "stability/robbins_monro" not in monitor.history
        assert vars(monitor.history["stability/robbins_monro_so_far"]) == {"steps": [72], "values": [1.0]}


def test_a_scheduler_of_another_optimizer_is_refused():
    model, other = net(), SGD(net().parameters(), lr=0.1)
    for wrong in (fading(other, True), [fading(other, True)], 3):
        with pytest.raises(ValueError, match="schedulers="):
            Watch(model, SGD(model.parameters(), lr=0.1), cross_entropy, schedulers=wrong)


def test_a_state_with_fewer_keys_is_not_misread():
    law, other = SGDLaw(), SGDLaw()
    state = other.state_dict()
    state["_numbers"] = {"stability/rate_square_sum": 19.0, "stability/of_another_release": 1.0}
    law.load_state_dict(state, strict=False)
    found = law.compute()
    assert found["stability/rate_square_sum"] == 19 and "stability/rate_decay" not in found
    assert "stability/of_another_release" not in found


def test_convex_training_is_promised_a_rate():
    class Linear(Model):
        def __init__(self):
            super().__init__(nn.Linear(3, 1).double(), partial(SGD, lr=0.05))

        def loss(self, batch):
            return F.mse_loss(self.net(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(random(64, 3), random(64, 1, seed=1)), batch_size=16, shuffle=True)
    monitor = StabilityMonitor([SGDLaw(probes=64)], every_n_steps=1)
    fit(Linear, monitor, loader=loader, max_steps=6)
    # The noise is fitted from the third measurement on.
    measured = monitor.history["stability/smoothness"].steps
    assert len(measured) > 2
    assert [monitor.history[f"stability/{name}"].steps for name in LAW] == [measured[2:]] * 3
    assert all(0 < q < 1 for q in monitor.history["stability/sgd_law_q"].values)
