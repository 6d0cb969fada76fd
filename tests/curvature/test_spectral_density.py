"""The density of the Hessian's eigenvalues: moments, bounds and errors, bulk and outliers, Marchenko and Pastur."""

import math

import pytest
import torch
from problems import Quadratic, close, dense_hessian, f64, freeze, random, regression, symmetric, tanh_mlp
from problems import Regression as Problem
from scipy.integrate import quad

from lsp_callbacks import Snapshot, SpectralDensity, Unmeasurable
from lsp_callbacks.functional import (
    MarchenkoPastur,
    fit_marchenko_pastur,
    smoothed_cumulative,
    smoothed_density,
    spectral_density,
)
from lsp_callbacks.linalg import from_matrix, quadratures
from lsp_callbacks.operators.cost import lanczos_cost
from lsp_callbacks.quantities.curvature import spectral_density as module

#: Ten eigenvalues apart from a bulk of both signs.
OUTLIERS = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 30.0]
SPIKED = [*(torch.linspace(-0.2, 0.5, 190, dtype=f64) ** 3).tolist(), *OUTLIERS]
#: The same, where outliers have copies.
COPIES = [*SPIKED[:190], 2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 10.0, 10.0, 10.0, 30.0]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def wishart(rows, columns, scale=1.0, seed=0):
    x = random(rows, columns, seed=seed)
    return scale * x @ x.T / columns


# Quadrature ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_polynomials_are_integrated_exactly(steps):
    """To degree 2 m - 1, and no further."""
    A, start = symmetric([-1.5, -1.0, -0.3, *torch.linspace(0, 2, 20).tolist()]), random(1, 23, seed=3)
    (run,) = quadratures(from_matrix(A), start, steps=steps)
    v = start[0] / start.norm()
    truth = lambda k: float(v @ torch.linalg.matrix_power(A, k) @ v)  # noqa: E731
    for degree in range(2 * steps):
        close(run.weights @ run.nodes**degree, truth(degree), 1e-10)
    assert abs(float(run.weights @ run.nodes ** (2 * steps)) - truth(2 * steps)) > 1e-8
    exact = (run.nodes[:, None] - torch.linalg.eigvalsh(A)).abs().min(1).values
    assert bool((exact <= run.residuals + 1e-10).all())


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("point", [-0.5, 0.0, 0.4])
def test_masses_are_bounds_and_the_best_ones(steps, point):
    """The true share of the start below the point lies between; the rule integrates what the moments fix."""
    A = symmetric([-2.0, -1.0, -0.5, -0.2, *[1e-3] * 12, *torch.linspace(0.1, 3, 14).tolist()])
    values, vectors = torch.linalg.eigh(A)
    for seed in range(10):
        start = random(1, 30, seed=seed)
        (run,) = quadratures(from_matrix(A), start, steps=steps)
        share = (vectors.T @ start[0] / start.norm()).square()
        below, at, above = run.masses(point).tolist()
        assert below <= share[values < point - 1e-9].sum() + 1e-12
        assert above <= share[values > point + 1e-9].sum() + 1e-12
        assert below + at + above == pytest.approx(1) and min(below, at, above) > -1e-12
        if steps < 12:  # 1 / sum p_k(point)^2, Christoffel's number: the largest mass there with the same moments
            polynomials = torch.linalg.eigh(_jacobi(A, start[0], steps))
            assert at == pytest.approx(_christoffel(*polynomials, A, start[0], steps, point), rel=1e-6)


def _jacobi(A, start, steps):
    """The plain three-term recurrence, with its next coupling."""
    q, before, beta = start / start.norm(), torch.zeros_like(start), 0.0
    T = torch.zeros(steps, steps, dtype=f64)
    for k in range(steps):
        w = A @ q - beta * before
        T[k, k] = w @ q
        w = w - T[k, k] * q
        beta = float(w.norm())
        if k + 1 < steps:
            T[k, k + 1] = T[k + 1, k] = beta
        before, q = q, w / beta
    return T


def _christoffel(values, vectors, A, start, steps, point):
    """By orthonormal polynomials of the start's measure up to degree ``steps``, from its moments' own recurrence."""
    T = _jacobi(A, start, steps + 1)
    p = [1.0]
    for k in range(steps):
        last = p[k - 1] * float(T[k, k - 1]) if k else 0.0
        p.append(((point - float(T[k, k])) * p[k] - last) / float(T[k, k + 1]))
    return 1 / sum(value**2 for value in p)


def test_the_masses_of_a_start_that_cannot_tell():
    (run,) = quadratures(
        from_matrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()), torch.eye(2, dtype=f64)[:1], steps=1
    )
    close(run.masses(), [0.0, 1.0, 0.0], 1e-12)  # half is at -1 and half at 1, and one step sees neither


# Estimates and their errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [SPIKED, COPIES, torch.linspace(-1, 2, 100).tolist()])
def test_estimates_are_unbiased_and_spread_as_they_say(spectrum):
    A, truth = from_matrix(symmetric(spectrum)), torch.tensor(spectrum, dtype=f64)
    found = [spectral_density(A, steps=24, generator=seeded(seed)) for seed in range(40)]
    sums = {"trace": truth.sum(), "square": truth.square().sum()}
    sums["effective_rank"] = sums["trace"] ** 2 / sums["square"]
    for name, exact in sums.items():
        values = torch.tensor([getattr(one, name) for one in found])
        errors = torch.tensor([getattr(one, f"{name}_error") for one in found])
        error = values.std() / 40**0.5
        # The rank is a ratio: unbiased to first order only.
        assert (values.mean() - exact).abs() <= 4 * error + (name == "effective_rank") * 0.03 * exact, name
        scores = (values - exact) / errors
        assert 0.7 < scores.abs().median() / 0.6745 < 1.4 and (scores.abs() < 2).double().mean() > 0.85, name
    sure = torch.tensor([one.negative for one in found])
    zero = torch.tensor([one.zero for one in found])
    share, error = (truth < 0).double().mean(), found[0].negative_error
    assert sure.mean() <= share + error and sure.mean() + zero.mean() >= share - error


def test_outliers_of_known_size_leave_only_the_bulks_error():
    """Plain averages over the same starts are off by 20 times as much."""
    A, truth = from_matrix(symmetric(SPIKED)), sum(SPIKED)
    found = [spectral_density(A, steps=40, generator=seeded(seed)) for seed in range(12)]
    plain = torch.tensor([200 * float(one.weights @ one.nodes) for one in found])
    ours = torch.tensor([one.trace for one in found])
    assert (ours - truth).std() < (plain - truth).std() / 20
    moved = spectral_density(from_matrix(symmetric([value + 1 for value in SPIKED])), steps=40)
    assert moved.trace_error < 0.6 and moved.trace == pytest.approx(truth + 200, abs=4 * moved.trace_error)


def test_the_share_of_negative_eigenvalues_where_few_steps_tell_it():
    found = spectral_density(from_matrix(symmetric([-1.0] * 60 + [2.0] * 140)), probes=20)
    assert found.negative == pytest.approx(0.3, abs=3 * found.negative_error) and found.zero < 1e-9
    close(found.negative_error, math.sqrt(2 * 0.3 * 0.7 / 202 / 20), 0.01)


# Bulk and outliers --------------------------------------------------------------------------------------------------


def test_outliers_stand_apart_from_the_bulk():
    found = spectral_density(from_matrix(symmetric(SPIKED)))
    close(found.outliers, OUTLIERS, 1e-6)
    assert bool((found.outlier_residuals < 1e-3).all())
    low, high = found.bulk
    assert 0.1 < high <= 0.125 and -0.008 <= low < 0
    assert found.least <= low and found.products == 80


@pytest.mark.parametrize("spectrum", [torch.linspace(0, 1, 300).tolist(), [*[0.0] * 260, *range(1, 41)]])
def test_what_has_no_outliers(spectrum):
    """An even spectrum; one in which a tenth and more stands apart."""
    found = spectral_density(from_matrix(symmetric([float(x) for x in spectrum])), steps=60)
    assert found.outliers is None or len(found.outliers) == 0


def test_two_clusters_are_a_bulk():
    found = spectral_density(from_matrix(symmetric([0.0] * 270 + [5.0] * 30)), steps=2)
    assert len(found.outliers) == 0
    close(found.bulk, [0.0, 5.0], 1e-9)


def test_negative_outliers_are_outliers():
    found = spectral_density(from_matrix(symmetric([-5.0, *torch.linspace(0, 1, 198).tolist(), 4.0])))
    close(found.outliers, [-5.0, 4.0], 1e-6)
    assert found.least == pytest.approx(-5)


# Marchenko and Pastur -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_the_law_is_its_density(ratio):
    law = MarchenkoPastur(ratio, 2.0, 0.3, 0.0, 0.1)
    low, high = law.edges
    nodes, weights = law.measure()

    def by_density(f):
        inside = lambda x: f(x) * math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * 2 * ratio * x)  # noqa: E731
        return 0.7 * quad(inside, low, high, limit=500)[0] + 0.3 * f(0.0)

    for f in (lambda x: 1.0, lambda x: x, lambda x: x**3, lambda x: math.exp(-x)):
        ours = float(weights @ torch.tensor([f(x) for x in nodes.tolist()], dtype=f64))
        assert ours == pytest.approx(by_density(f), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "scale", "zeros"),
    [(400, 800, 0.5, 1.0, 0.0), (400, 200, 0.5, 2.0, 0.5), (400, 40, 0.1, 10.0, 0.9), (400, 4000, 0.1, 1.0, 0.0)],
)
def test_a_wishart_matrix_is_recognised(rows, columns, ratio, scale, zeros):
    A = 3 * wishart(rows, columns)
    found = spectral_density(from_matrix(A), probes=4)
    fit = found.fit
    assert fit.alike and fit.distance < 0.04
    assert (fit.ratio, fit.scale, fit.zero_mass) == (
        pytest.approx(ratio, abs=0.1), pytest.approx(3 * scale, rel=0.1), pytest.approx(zeros, abs=0.05),
    )  # fmt: skip
    values = torch.linalg.eigvalsh(A)
    points = torch.linspace(-1, float(values[-1]) + 1, 100, dtype=f64)
    dense = smoothed_cumulative(values, torch.full_like(values, 1 / rows), points, fit.width)
    assert (smoothed_cumulative(found.nodes, found.weights, points, fit.width) - dense).abs().max() < 0.05
    nodes, weights = fit.measure()
    assert (smoothed_cumulative(nodes, weights, points, fit.width) - dense).abs().max() < 0.05


def test_spikes_do_not_spoil_the_fit():
    x = random(600, 1200)
    x[:5] *= torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0], dtype=f64)[:, None]
    found = spectral_density(from_matrix(x @ x.T / 1200))
    assert len(found.outliers) == 5 and found.fit.alike
    assert found.fit.ratio == pytest.approx(0.5, abs=0.1)
    assert found.bulk[1] == pytest.approx(found.fit.edges[1], rel=0.1)


@pytest.mark.parametrize(
    "spectrum",
    [
        (torch.linspace(0.01, 1, 300) ** -1).tolist(),  # a heavy tail
        [*[0.0] * 280, *torch.linspace(0.5, 1.5, 20).tolist()],  # the zeros alone fit any law
        [*[1.0] * 150, *torch.linspace(4, 5, 150).tolist()],
    ],
)
def test_what_is_no_such_law_is_refused(spectrum):
    found = spectral_density(from_matrix(symmetric(spectrum)), probes=4)
    assert found.fit is None or not found.fit.alike


def test_zeros_alone_make_no_law():
    nodes, weights = torch.tensor([0.0, 1.0, 4.0], dtype=f64), torch.tensor([0.99, 0.005, 0.005], dtype=f64)
    found = fit_marchenko_pastur(nodes, weights, width=0.1)
    assert found.zero_mass > 0.98 and not found.alike and 0.1 < found.distance <= 1


def test_the_share_of_zeros_is_not_negative():
    nodes, weights = MarchenkoPastur(0.5, 1.0, 0.0, 0.0, 0.1).measure()
    found = fit_marchenko_pastur(nodes + 0.3, weights, width=0.1)
    assert found.zero_mass == 0
    close([found.scale, found.scale**2 * found.ratio], [1.3, 0.5], 1e-3)  # mean and variance


def test_no_positive_mean_no_law():
    ones = torch.ones(3, dtype=f64)
    assert fit_marchenko_pastur(torch.tensor([-1.0, 0.0, 0.5], dtype=f64), ones, width=0.1) is None
    assert fit_marchenko_pastur(0 * ones, ones, width=0.1) is None


def test_the_density_has_the_mass_of_its_weights():
    nodes, weights = random(5), torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=f64)
    points = torch.linspace(-6, 6, 4001, dtype=f64)
    heights = smoothed_density(nodes, weights, points, 0.2)
    close(torch.trapezoid(heights, points), 1.0, 1e-9)
    close(smoothed_cumulative(nodes, weights, points, 0.2)[-1], 1.0, 1e-9)
    steps = (heights[1:] + heights[:-1]) / 2 * (points[1] - points[0])
    close(steps.cumsum(0), smoothed_cumulative(nodes, weights, points, 0.2)[1:], 1e-5)


# Networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_networks_density_is_that_of_its_dense_hessian(method):
    """Cumulatives within the Monte-Carlo error, trace, least and negative share within theirs."""
    task = Problem(tanh_mlp(6, 16, 12, 3), random(40, 6, seed=1), random(40, 3, seed=2))
    values = torch.linalg.eigvalsh(dense_hessian(task))
    metric, n = SpectralDensity(probes=4, steps=30, method=method), len(values)
    metric.update(freeze(task))
    found, keys = metric.latest, {k.removeprefix("stability/"): float(v) for k, v in metric.compute().items()}
    assert found.size == n == 355
    assert keys["hessian_trace"] == pytest.approx(float(values.sum()), abs=3 * keys["hessian_trace_error"])
    assert keys["hessian_trace_error"] < 0.2 * values.sum()
    share = float((values < 0).double().mean())
    sure, error = keys["hessian_negative_mass"], 3 * keys["hessian_negative_mass_error"]
    assert sure <= share + error and sure + keys["hessian_zero_mass"] >= share - error
    assert keys["hessian_min"] == pytest.approx(
        float(values[0]), abs=keys["hessian_min_residual"] + 1e-3 * float(values[-1])
    )
    points, width = torch.linspace(float(values[0]), float(values[-1]), 200, dtype=f64), 0.02 * float(values[-1])
    dense = smoothed_cumulative(values, torch.full_like(values, 1 / n), points, width)
    ours = smoothed_cumulative(found.nodes, found.weights, points, width)
    assert (ours - dense).abs().max() <= 4 * math.sqrt(2 * 0.25 / (n + 2) / 4)
    known = torch.cat([values[:5], values[-20:]])
    for value in found.outliers if found.outliers is not None else ():
        assert (known - value).abs().min() < 1e-3 * values[-1]


def test_a_small_network_is_known_exactly():
    task = regression()
    values = torch.linalg.eigvalsh(dense_hessian(task))
    metric = SpectralDensity(method="exact")
    metric.update(freeze(task))
    found = metric.latest
    close(found.nodes, values, 1e-9), close(found.weights, torch.full((21,), 1 / 21, dtype=f64), 1e-12)
    assert (found.trace_error, found.negative_error) == (0.0, 0.0)
    assert found.negative == pytest.approx(float((values < -1e-3 * values[-1]).double().mean()))
    cost = lanczos_cost(freeze(task), "exact", 21)  # one basis of everything
    assert metric.cost(freeze(task))["density"] == pytest.approx(cost) and cost > 3.3 + 2 * 20
    assert "stability/hessian_outliers" not in metric.compute()


# Degenerate ---------------------------------------------------------------------------------------------------------


def measured(curvature, **settings):
    metric = SpectralDensity(**settings)
    metric.update(freeze(Quadratic(curvature)))
    return metric, {key.removeprefix("stability/hessian_"): float(value) for key, value in metric.compute().items()}


@pytest.mark.parametrize("n", [1, 60])
def test_a_hessian_that_is_zero(n):
    metric, keys = measured(torch.zeros(n, n, dtype=f64))
    assert (keys["trace"], keys["zero_mass"], keys["min"]) == (0.0, pytest.approx(1), 0.0)
    assert "effective_rank" not in keys and "mp_distance" not in keys
    metric.plot()


@pytest.mark.parametrize("n", [30, 300])
def test_rank_one(n):
    g = random(n)
    _, keys = measured(torch.outer(g, g), method="exact")
    close(keys["trace"], g @ g, 1e-9), close(keys["effective_rank"], 1.0, 1e-9)
    assert keys["negative_mass"] == pytest.approx(0, abs=1e-9) and keys["zero_mass"] > 0.9
    assert keys["outliers"] == 1 if n == 300 else "outliers" not in keys or keys["outliers"] <= 1
    assert keys["min"] == pytest.approx(0, abs=1e-9)


def test_a_multiple_of_the_identity():
    _, keys = measured(2 * torch.eye(200, dtype=f64), method="exact")
    close([keys["trace"], keys["effective_rank"], keys["min"], keys["bulk_edge"]], [400, 200, 2, 2], 1e-9)
    assert (keys["outliers"], keys["negative_mass"]) == (0, 0) and "mp_distance" not in keys


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_a_number_is_refused(poison):
    A = torch.eye(60, dtype=f64)
    A[1, 2] = A[2, 1] = poison
    task = Quadratic(A)
    with pytest.raises(Unmeasurable, match="products are not finite"):
        SpectralDensity().update(Snapshot(0, task, task))
    found = spectral_density(from_matrix(A))
    assert math.isnan(found.trace) and math.isnan(found.negative) and found.fit is None


def test_bad_arguments():
    for arguments in ({"probes": 1}, {"steps": 2}, {"method": "guess"}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
            SpectralDensity(**arguments)
    with pytest.raises(ValueError, match="probes=1"):
        spectral_density(from_matrix(torch.eye(3)), probes=1)


# The picture --------------------------------------------------------------------------------------------------------


def test_the_course_is_kept_evenly_and_bounded(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 4)
    task, metric = regression(), SpectralDensity()
    for step in range(17):
        metric.update(freeze(task, step=step))
    assert [step for step, _ in metric.history] == [0, 8, 16]
    metric.load_vectors({})
    assert metric.latest is not None and len(metric.history) == 3  # a checkpoint was written
    metric.reset()
    assert metric.latest is None and metric.history == []
    with pytest.raises(ValueError, match="nothing has been measured"):
        metric.plot()


def test_the_picture():
    from matplotlib.figure import Figure

    task, metric = Quadratic(symmetric(SPIKED)), SpectralDensity()
    metric.update(freeze(task))
    figure, ax = metric.plot()
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["density, smoothed by 0.25", "10 outliers"]  # no law that does not fit
    low, high = ax.get_xlim()
    assert low < -0.008 and high > 30 and figure.axes == [ax]
    (line,) = ax.lines
    points = (torch.as_tensor(line.get_xdata().tolist()) / 0.3).asinh()  # a hundredth of the largest
    assert float(torch.trapezoid(torch.as_tensor(line.get_ydata().tolist()), points)) == pytest.approx(1, abs=1e-3)
    metric.update(freeze(Quadratic(symmetric([value / 100 for value in SPIKED])), step=7))
    figure, axes = metric.plot()
    assert axes[0].get_xlim()[1] > 30  # the first reaches further than the last
    assert len(axes) == 2 and axes[0].get_xlim() == axes[1].get_xlim()
    assert 10.0 in axes[1].get_xticks()
    (mesh,) = [each for each in axes[1].collections if each.__class__.__name__ == "QuadMesh"]
    assert mesh.get_array().shape == (2, 400) and axes[1].get_ylim() == (-3.5, 10.5)
    mine = Figure().subplots()
    found = spectral_density(from_matrix(wishart(300, 600)))
    assert metric.plot(found, ax=mine)[1] is mine
    assert any("Marchenko-Pastur, off by 0.0" in text for text in mine.get_legend_handles_labels()[1])
