import cmath
import math

import numpy as np
import pytest
import torch
from problems import (
    AR1_BATCH_MEANS,
    AR1_NAIVE,
    AR1_STANDARD_ERROR,
    MOMENTUM_EXPONENTS,
    TRANSIENT_GROWTH,
    UNDERDAMPED_EXPONENT,
    Quadratic,
    ar1,
    close,
    f64,
    freeze,
    matrix,
    random,
    regression,
    symmetric,
    take,
    trajectory,
)
from scipy import stats

from lsp_callbacks import Lyapunov, LyapunovTrajectory, Sharpness, Unmeasurable
from lsp_callbacks.functional import (
    SoftThreshold,
    batch_means,
    exponent_bounds,
    plane_map,
    rescale,
    sharp_mode_exponent,
    sharp_plane,
    stability_constant,
    student_bounds,
    student_quantile,
    window_exponent,
)
from lsp_callbacks.linalg import from_matrix, push
from lsp_callbacks.operators import hessian, step_jacobian
from lsp_callbacks.operators.curvature.followed_top import COLD
from lsp_callbacks.operators.curvature.stability_threshold import stability_threshold
from lsp_callbacks.operators.trajectory.coming_preconditioner import REMEMBERED
from lsp_callbacks.operators.trajectory.proximal import update_jacobian
from lsp_callbacks.quantities.curvature.sharpness import measured_mode
from lsp_callbacks.step.clipping import Clipping

SGD = torch.optim.SGD
WINDOWS = (1, 2, 4, 8)
RULES = [
    *({"momentum": beta} for beta in (0.0, 0.5, 0.9, 0.99)),
    *({"momentum": beta, "nesterov": True} for beta in (0.5, 0.9, 0.99)),
    *({"momentum": beta, "dampening": tau} for beta in (0.0, 0.5, 0.9, 0.99) for tau in (0.3, beta)),
]


def started(problem, optimizer):
    """Past the first step, where the momentum buffer exists."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take(optimizer, problem())
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return optimizer


def spectral_exponent(x, momentum=0.0, dampening=0.0, nesterov=False):
    """``log rho`` of the companion matrix for ``x = lr * curvature``: the roots of ``z^2 - trace z + det`` by hand."""
    if not momentum:
        return math.log(abs(1 - x))
    if nesterov:
        trace, det = (1 + momentum) * (1 - x), momentum * (1 - x)
    else:
        trace, det = 1 + momentum - (1 - dampening) * x, momentum
    root = cmath.sqrt(trace**2 / 4 - det)
    return math.log(max(abs(trace / 2 + root), abs(trace / 2 - root)))


# The sharp mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sign_and_value_on_both_sides_of_the_edge(rule):
    """On a quadratic the exponent is the companion matrix's, for every window, and its sign is that of courant - 1."""
    h = 2.5
    problem = Quadratic(torch.diag(torch.tensor([0.3, h, 1.0], dtype=f64)))
    mode = torch.tensor([0.0, 1.0, 0.0], dtype=f64)
    constant = stability_constant(**rule)
    optimizer = started(problem, SGD(problem.parameters(), lr=1.0, **rule))
    for courant in (0.01, 0.2, 0.45, 0.7, 0.9, 0.98, 1.02, 1.1, 1.5, 3.0):
        optimizer.param_groups[0]["lr"] = courant * constant / h
        rate = courant * constant / h
        buffer_scale = rate**-0.5 if rule["momentum"] else None
        A = step_jacobian(freeze(problem, optimizer), method="exact")
        for window in WINDOWS:
            exponent = sharp_mode_exponent([A] * window, mode, root=rate**0.5, buffer_scale=buffer_scale)
            close(exponent, spectral_exponent(courant * constant, **rule), 1e-10)
            assert (exponent > 0) == (courant > 1)


@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_rates_that_differ_by_group_leave_it_exact(rule, window):
    """The quadratic couples the groups, so that the mode has a share in both."""
    problem = Quadratic(symmetric([0.2, 1.0, 2.0, 6.0]), sizes=(2, 2))
    groups = [{"params": [p], "lr": lr} for p, lr in zip(problem.parts, (0.5, 0.02))]
    optimizer = started(problem, SGD(groups, weight_decay=0.1, **rule))
    snapshot = freeze(problem, optimizer)
    found = stability_threshold(snapshot, steps=4, tol=1e-12, method="exact")
    A = step_jacobian(snapshot, method="exact")
    rate = torch.tensor([0.5, 0.5, 0.02, 0.02], dtype=f64)
    curvature = torch.linalg.eigvals(rate[:, None] * (problem.curvature + 0.1 * torch.eye(4))).real.max()
    expected = spectral_exponent(float(curvature), **rule)
    close(
        sharp_mode_exponent([A] * window, found.mode, root=found.root, buffer_scale=found.buffer_scale), expected, 1e-8
    )


@pytest.mark.parametrize("curvature, expected", MOMENTUM_EXPONENTS.items())
def test_momentum_by_curvature(curvature, expected):
    problem = Quadratic(matrix([[curvature]]))
    A = step_jacobian(freeze(problem, started(problem, SGD(problem.parameters(), lr=0.1, momentum=0.9))))
    for window in WINDOWS:
        close(sharp_mode_exponent([A] * window, torch.ones(1, dtype=f64), buffer_scale=1.0), expected, 1e-6)


@pytest.mark.parametrize("x, wrong", TRANSIENT_GROWTH.items())
def test_growth_from_an_empty_buffer_is_not_the_exponent(x, wrong):
    """The naive growth of ||(v, lr m)|| says unstable where the step is stable; the compressed plane does not."""
    problem = Quadratic(matrix([[x]]))
    A = step_jacobian(freeze(problem, started(problem, SGD(problem.parameters(), lr=1.0, momentum=0.9))))
    z = matrix([[1.0, 0.0]])
    for _ in range(4):
        z = push(A, z)
    close(float(torch.linalg.vector_norm(z).log()) / 4, wrong, 1e-3)
    close(sharp_mode_exponent([A] * 4, torch.ones(1, dtype=f64), buffer_scale=1.0), UNDERDAMPED_EXPONENT, 1e-6)


def test_an_unconverged_mode_biases_down():
    """Two plain products against a flat bulk of 200 modes miss the alarm: hence Lanczos, and its error bar."""
    spectrum = torch.ones(201, dtype=f64)
    spectrum[0] = 2.105  # log|1 - 2.105| = +0.10
    A = from_matrix(torch.diag(1 - spectrum))
    truth = math.log(1.105)
    rough = spectrum**2 / torch.linalg.vector_norm(spectrum**2)
    close(sharp_mode_exponent([A] * 4, torch.eye(201, dtype=f64)[0]), truth, 1e-12)
    curvature = 1 + 1.105 * rough[0] ** 2  # along the rough mode
    close(sharp_mode_exponent([A] * 4, rough), math.log(curvature - 1), 1e-12)
    assert math.log(curvature - 1) < -0.2
    P, C = matrix([[1 - curvature]]), matrix([[-curvature]])
    low, high = exponent_bounds([P] * 4, [C] * 4, 0.0, 2.105 / curvature - 1)
    close([low, high], [math.log(curvature - 1), truth], 1e-12)


def test_what_is_wrong_by_an_angle_errs_by_its_square():
    """Below the edge, where the rest shrinks more slowly, a norm would tell the rest: -1.24 for -1.61."""
    spectrum = torch.tensor([1.2, 0.01, 0.1, 0.3, 0.5], dtype=f64)  # log|1 - 1.2| = -1.609
    A = from_matrix(torch.diag(1 - spectrum))
    errors = []
    for angle in (0.02, 0.04, 0.08):
        mode = torch.tensor([math.cos(angle), *[math.sin(angle) / 2] * 4], dtype=f64)
        for window in WINDOWS:
            errors.append(sharp_mode_exponent([A] * window, mode) - math.log(0.2))
        assert abs(errors[-1]) < 6 * angle**2
        norm = torch.linalg.vector_norm((1 - spectrum) ** 8 * mode).log() / 8
        assert norm - math.log(0.2) > 10 * abs(errors[-1])
    close(errors[::4], errors[3::4], 1e-12)  # whatever the window
    assert 3.9 < errors[8] / errors[4] < 4.1 or 3.9 < errors[4] / errors[0] < 4.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bounds_hold_the_exponents_of_all_curvatures_between(momentum):
    def step(x):
        return matrix([[1 - x]]) if not momentum else matrix([[1 - x, -momentum], [x, momentum]])

    for x in (0.02, 0.3, 0.9, 1.5, 1.9, 2.5, 3.6, 3.79, 3.9):
        for below, above in ((0.0, 0.0), (0.01, 0.05), (0.0, 0.3)):
            low, high = exponent_bounds([step(x)] * 4, [step(x) - step(0.0)] * 4, below, above)
            inside = [window_exponent([step(y)]) for y in np.linspace(x * (1 - below), x * (1 + above), 200)]
            assert low <= min(inside) + 1e-9 and high >= max(inside) - 1e-9
            assert high <= max(inside) + 1e-9  # and no wider
            assert low >= min(inside) - 1e-3 or low == -math.inf
    if not momentum:  # a number that passes 0
        assert exponent_bounds([step(0.9)] * 2, [step(0.9) - step(0.0)] * 2, 0.0, 0.2)[0] == -math.inf
    assert all(map(math.isnan, exponent_bounds([step(1.0)], [step(1.0)], 0.0, math.nan)))


@pytest.mark.parametrize(
    "momentum, rates, below, above", [(0.0, (0.5, 2.0), 0.45, 0.95), (0.9, (1.9, 1.9), 0.9995, 1.05)]
)
def test_bounds_contain_what_the_exponent_is_between_the_ends(momentum, rates, below, above):
    """A product of steps is largest between its zeros; momentum's is least where the eigenvalues are complex."""

    def step(x):
        return matrix([[1 - x]]) if not momentum else matrix([[1 - x, -momentum], [x, momentum]])

    shifts = np.linspace(-below, above, 2001)
    exponents = [window_exponent([step(x * (1 + d)) for x in rates]) for d in shifts]
    low, high = exponent_bounds([step(x) for x in rates], [step(x) - step(0.0) for x in rates], below, above)
    assert low <= min(exponents) + 0.01 and max(exponents) - 0.01 <= high <= max(exponents) + 1e-9
    ends = exponents[0], exponents[-1]
    assert max(exponents) > max(ends) + 0.03 or min(exponents) < min(ends) - 0.03  # otherwise the ends would do


def test_steps_that_differ_are_multiplied():
    factors = (0.5, -3.0, 0.1)
    exponent = sharp_mode_exponent([from_matrix(matrix([[f]])) for f in factors], torch.ones(1, dtype=f64))
    close(exponent, np.log(np.abs(factors)).mean(), 1e-14)


@pytest.mark.parametrize("size", [1, 2], ids=["plain", "momentum"])
@pytest.mark.parametrize("value, expected", [(0.0, -math.inf), (math.nan, math.nan)])
def test_degenerate_steps(size, value, expected):
    A = from_matrix(torch.full((size, size), value, dtype=f64))
    buffer_scale = 1.0 if size == 2 else None
    assert sharp_mode_exponent([A] * 2, torch.ones(1, dtype=f64), buffer_scale=buffer_scale) == pytest.approx(
        expected, nan_ok=True
    )


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="no step"):
        sharp_mode_exponent([], torch.ones(1))


@pytest.mark.parametrize("factor, dtype", [(1e30, torch.float32), (1e-30, torch.float32), (1e200, f64)])
def test_no_window_overflows(factor, dtype):
    A = from_matrix(torch.full((1, 1), factor, dtype=dtype))
    close(sharp_mode_exponent([A] * 8, torch.ones(1, dtype=dtype)), math.log(factor), 1e-6)


@pytest.mark.parametrize("entry", [0.0, math.inf, math.nan])
def test_what_cannot_be_rescaled_is_left(entry):
    frame, log = rescale(torch.tensor([[entry, 0.0]]))
    assert log == 0.0 and torch.equal(frame.nan_to_num(), torch.tensor([[entry, 0.0]]).nan_to_num())


def test_a_parameter_at_rate_zero_does_not_spoil_the_exponent():
    problem = Quadratic(torch.diag(torch.tensor([4.0, 9.0], dtype=f64)), sizes=(1, 1))
    optimizer = SGD([{"params": [p], "lr": lr} for p, lr in zip(problem.parts, (0.1, 0.0))])
    snapshot = freeze(problem, optimizer)
    found = stability_threshold(snapshot, steps=2, tol=1e-12, method="exact")
    A = step_jacobian(snapshot, method="exact")
    close(sharp_mode_exponent([A] * 3, found.mode, root=found.root), math.log(0.6), 1e-12)


def test_the_plane_is_pushed_in_the_units_of_the_step():
    root = torch.tensor([0.5, 2.0], dtype=f64)
    mode = torch.tensor([0.6, 0.8], dtype=f64)
    for buffer_scale in (None, 1 / root, 0.25):
        for size in (4, 6):
            frame = sharp_plane(mode, root, buffer_scale=buffer_scale, size=size)
            assert frame.shape == (1 if buffer_scale is None else 2, size)
            close(frame[0], torch.cat([root * mode, torch.zeros(size - 2)]), 1e-15)
            A = from_matrix(3 * torch.eye(size, dtype=f64))
            close(plane_map(A, mode, root, buffer_scale=buffer_scale)[0], 3 * torch.eye(len(frame)), 1e-14)
            if buffer_scale is not None:
                close(frame[1], torch.cat([torch.zeros(2), buffer_scale * mode, torch.zeros(size - 4)]), 1e-15)


# Along a real run ---------------------------------------------------------------------------------------------------


def run(metric, problem, optimizer, steps, skip=()):
    """The values after each measurement that was completed, by the step that completed it."""
    found = {}
    for snapshot in trajectory(problem, optimizer, steps):
        if snapshot.step not in skip:
            metric.update(snapshot)
            if metric.complete:
                found[snapshot.step] = {key: float(value) for key, value in metric.compute().items()}
    return found


@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("x", [0.3, 1.3, 4.1])
def test_lyapunov_measures_windows_of_a_real_run(rule, x):
    problem = Quadratic(symmetric([0.1, 0.4, 5.0]))
    found = run(Lyapunov(window=3, method="exact"), problem, SGD(problem.parameters(), lr=x / 5, **rule), 16)
    first = 3 if rule else 2  # in the first step there is no momentum
    assert list(found) == list(range(first, 16, 3))  # each window begins with the step that aligns
    expected = spectral_exponent(x, **rule)
    for number, values in enumerate(found.values(), start=1):
        # The mode is aligned to a residual of 5 % only: that bounds the error, not the tolerance of the arithmetic.
        close(values["stability/lyapunov"], expected, 0.06)
        assert values["stability/lyapunov"] * expected > 0
        assert ("stability/lyapunov_lower" in values) == ("stability/lyapunov_upper" in values) == (number >= 3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_rate_zero_nothing_grows_or_shrinks(momentum):
    problem = regression()
    found = run(Lyapunov(), problem, SGD(problem.parameters(), lr=0.0, momentum=momentum), 2)
    close(found[1]["stability/lyapunov"], 0.0, 1e-12)


def test_alone_it_takes_no_products_for_the_sharpness_of_a_preconditioned_step():
    """Only the preconditioned Hessian has to be followed; beside sharpness the whole alignment is shared."""
    counts, exponents = {}, {}
    for beside in (False, True):
        problem = regression()
        optimizer = torch.optim.Adam(problem.parameters(), lr=1e-3)
        for _ in range(REMEMBERED):
            take(optimizer, problem())
        metric, calls = Lyapunov(method="finite_difference"), []
        snapshot = freeze(problem, optimizer, replay=lambda calls=calls, net=problem: calls.append(1) or net())
        calls.clear()
        if beside:
            Sharpness(method="finite_difference").update(snapshot)
        before = len(calls)
        metric.update(snapshot)
        counts[beside], exponents[beside] = len(calls) - before, float(metric.windows)
    assert counts[True] <= 2 and COLD <= counts[False] - counts[True] < 2 * COLD
    close(exponents[False], exponents[True], 1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_under_sgd_it_takes_no_product_beside_sharpness(momentum):
    """Its curvature is the estimate that sharpness is: the exponent is that of the Courant number, with its bar."""
    problem = regression()
    optimizer = started(problem, SGD(problem.parameters(), lr=0.5, momentum=momentum))
    sharpness, metric, calls = Sharpness(method="finite_difference"), Lyapunov(method="finite_difference"), []
    for step in range(3):
        snapshot = freeze(problem, optimizer, step=step, replay=lambda: calls.append(1) or problem())
        sharpness.update(snapshot)
        before = len(calls)
        metric.update(snapshot)
        assert len(calls) == before
        told = sharpness.numbers()
        x, bar = 0.5 * told["stability/sharpness"], told["stability/sharpness_residual"]
        close(metric.windows[-1], spectral_exponent(x, momentum=momentum), 1e-6)
        between = [spectral_exponent(x * (1 + d * bar), momentum=momentum) for d in np.linspace(-1, 1, 17)]
        removes = not momentum and x * (1 - bar) <= 1 <= x * (1 + bar)
        close(metric.spans[-1], [-math.inf if removes else min(between), max(between)], 1e-3)
        take(optimizer, problem())


@pytest.mark.parametrize("how", ["clipped", "prox"])
def test_what_knows_more_of_the_curvature_than_its_eigenvalue_takes_a_product(how):
    """Clipping takes away the share of ``H v`` along the gradient, a prox reads along another direction than v."""
    problem = regression()
    optimizer = SGD(problem.parameters(), lr=0.3)
    settings = {"clipping": Clipping(0.1)} if how == "clipped" else {"prox": SoftThreshold(1e-3)}
    snapshot = freeze(problem, optimizer, **settings)
    metric = Lyapunov(method="exact")
    metric.update(snapshot)
    mode = metric.vectors()["mode"]
    step, _ = plane_map(update_jacobian(snapshot, method="exact"), mode)
    close(metric.windows, [float(step.abs().log())], 1e-6)


def test_lyapunov_averages_the_last_windows_with_student_bounds():
    metric, problem = Lyapunov(window=2, average=4), regression()
    run(metric, problem, SGD(problem.parameters(), lr=0.3, momentum=0.5), 21)
    assert len(metric.windows) == 4
    values, windows = metric.compute(), metric.windows.numpy()
    low, high = stats.t.interval(0.8, 3, 0.0, stats.sem(windows))  # 0.8 two-sided: 0.9 on each side
    least, most = metric.spans.numpy().mean(0)
    close(values["stability/lyapunov"], windows.mean(), 1e-14)
    close(values["stability/lyapunov_lower"], least + low, 1e-6)
    close(values["stability/lyapunov_upper"], most + high, 1e-6)
    assert bool(((metric.spans[:, 0] <= metric.windows) & (metric.windows <= metric.spans[:, 1])).all())


def test_bounds_are_wider_by_the_spread_of_the_windows():
    metric = Lyapunov()
    metric.windows = matrix([-0.3, 0.1, -0.2, 0.3])
    metric.spans = torch.stack([metric.windows - 0.05, metric.windows + 0.02], 1)
    values, windows = metric.compute(), metric.windows.numpy()
    low, high = stats.t.interval(0.8, 3, windows.mean(), stats.sem(windows))
    close(values["stability/lyapunov_lower"], low - 0.05, 1e-6)
    close(values["stability/lyapunov_upper"], high + 0.02, 1e-6)
    assert high - low > 0.3


def test_bounds_after_a_restart_are_those_of_the_new_windows():
    problem, metric = Quadratic(symmetric([0.1, 0.4, 5.0])), Lyapunov(window=1, average=5)
    optimizer = SGD(problem.parameters(), lr=0.1)
    run(metric, problem, optimizer, 12)
    metric.restart()
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    run(metric, problem, optimizer, 6)
    values = metric.compute()
    for end in ("", "_lower", "_upper"):
        close(values[f"stability/lyapunov{end}"], math.log(0.5), 1e-3)


def test_windows_of_a_state_without_spans_have_no_bounds():
    metric = Lyapunov()
    metric.windows = torch.zeros(4, dtype=f64)
    values = metric.compute()
    assert values["stability/lyapunov"] == 0 and values["stability/lyapunov_lower"].isnan()
    assert values["stability/lyapunov_upper"].isnan()


def test_a_window_is_the_product_of_the_jacobians_of_its_own_steps():
    """Brute force: the same window from dense Jacobians, each restricted to the plane, without the metric."""
    problem = regression()
    optimizer = started(problem, SGD(problem.parameters(), lr=0.4, momentum=0.8))
    metric, product, mode = Lyapunov(window=3, method="exact"), torch.eye(2, dtype=f64), None
    for snapshot in trajectory(problem, optimizer, 4):
        metric.update(snapshot)
        jacobian = step_jacobian(snapshot, method="exact").dense()
        if snapshot.step == 0:
            mode, found = metric.vectors()["mode"], measured_mode(snapshot, None, None, "exact")
            H = hessian(snapshot, method="exact").dense()
            values, vectors = torch.linalg.eigh(H)
            close(abs(mode @ vectors[:, -1]), 1.0, 1e-2)
            close(found.eigenvalue[0], values[-1], 1e-2)
            plane = torch.zeros(2, 42, dtype=f64)
            plane[0, :21] = plane[1, 21:] = mode
            missing = 0.4 * (found.eigenvalue[0] - mode @ H @ mode)  # the first step takes the estimate
            product = plane @ jacobian @ plane.T + missing * matrix([[-1.0, 0.0], [1 / 0.4, 0.0]])
        elif snapshot.step < 3:
            product = plane @ jacobian @ plane.T @ product
    radius = torch.linalg.eigvals(product).abs().max()
    close(metric.windows, [float(radius.log()) / 3], 1e-10)


def test_a_gap_in_the_steps_restarts_the_window():
    problem = Quadratic(symmetric([0.1, 0.4, 5.0]))
    found = run(Lyapunov(window=3), problem, SGD(problem.parameters(), lr=0.1), 12, skip=(2, 9))
    assert list(found) == [5, 8]  # 0, 1 | 3, 4, 5 | 6, 7, 8 | 10, 11


def test_a_window_that_blows_up_is_refused_and_does_not_hide_the_others():
    problem, metric = Quadratic(symmetric([0.1, 0.4, 5.0])), Lyapunov(window=2)
    optimizer = SGD(problem.parameters(), lr=0.1)
    run(metric, problem, optimizer, 3)
    with torch.no_grad():
        problem.parts[0].fill_(math.nan)
    for snapshot in trajectory(problem, optimizer, 3):
        with pytest.raises(Unmeasurable, match="not finite"):
            metric.update(snapshot)
    assert len(metric.windows) == 1 and metric.compute()["stability/lyapunov"].isfinite()


def test_trajectory_measures_the_whole_spectrum_of_a_quadratic():
    curvature, lr = torch.tensor([0.1, 1.0, 4.0], dtype=f64), 0.7
    problem = Quadratic(symmetric(curvature.tolist()))
    metric = LyapunovTrajectory(k=3, transient=60, window=40, method="exact")
    found = run(metric, problem, SGD(problem.parameters(), lr=lr), 205)
    expected = (1 - lr * curvature).abs().log().sort(descending=True).values
    assert list(found) == [99, 199]
    for values in found.values():
        assert values["stability/lyapunov_trajectory_error"] < 1e-6
        names = ("stability/lyapunov_trajectory", "stability/lyapunov_spectrum/2", "stability/lyapunov_spectrum/3")
        close([values[name] for name in names], expected, 1e-6)


def test_trajectory_sees_neutral_directions_where_the_sharp_mode_is_stable():
    """A direction that the loss does not see holds the exponent over all parameters at 0."""
    problem = Quadratic(symmetric([0.0, 2.0]))
    trajectory_, sharp = LyapunovTrajectory(transient=20, window=40), Lyapunov(window=4)
    optimizer = SGD(problem.parameters(), lr=0.3)
    assert run(trajectory_, problem, optimizer, 60)[59]["stability/lyapunov_trajectory"] == pytest.approx(0, abs=1e-6)
    assert run(sharp, problem, optimizer, 4)[3]["stability/lyapunov"] == pytest.approx(math.log(0.4), abs=1e-4)


def test_trajectory_with_momentum_agrees_with_the_companion_matrix():
    problem = Quadratic(symmetric([2.0, 39.0]))
    metric = LyapunovTrajectory(transient=60, window=40, method="exact")
    found = run(metric, problem, SGD(problem.parameters(), lr=0.1, momentum=0.9), 100)
    close(found[99]["stability/lyapunov_trajectory"], MOMENTUM_EXPONENTS[39.0], 1e-5)


def test_the_exponents_of_a_frame_are_told_sorted():
    """Over a finite window the directions of the frame need not come in the order of their exponents."""
    metric = LyapunovTrajectory(k=3, transient=0, window=40)
    metric.growth = torch.tensor([[-0.3, 0.2, -0.1]] * 40, dtype=f64) + 0.01 * random(40, 3)
    values, (mean, error) = metric.compute(), batch_means(metric.growth)
    names = ["trajectory", "spectrum/2", "spectrum/3"]
    close([values[f"stability/lyapunov_{name}"] for name in names], mean[[1, 2, 0]], 1e-14)
    close(values["stability/lyapunov_trajectory_error"], error[1], 1e-14)


@pytest.mark.parametrize(
    "quantity, settings, argument",
    [
        (Lyapunov, {"window": 0}, "window=0"),
        (Lyapunov, {"average": 0}, "average=0"),
        (LyapunovTrajectory, {"window": 39}, "window=39"),
        (LyapunovTrajectory, {"k": 0}, "k=0"),
        (LyapunovTrajectory, {"transient": -1}, "transient=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(quantity, settings, argument):
    with pytest.raises(ValueError, match=argument):
        quantity(**settings)


def test_a_dear_window_is_made_shorter():
    problem = regression()
    optimizer = started(problem, SGD(problem.parameters(), lr=0.1, momentum=0.9))
    metric, snapshot = Lyapunov(window=4), freeze(problem, optimizer)
    costs = [sum(Lyapunov(window=window).cost(snapshot).values()) for window in (1, 2, 3, 4)]
    assert metric.limit_cost(snapshot, 1e9) is None
    assert metric.limit_cost(snapshot, (costs[1] + costs[2]) / 2) == "2 of 4 steps in a window"
    assert sum(metric.cost(snapshot).values()) == pytest.approx(costs[1])
    found = run(metric, problem, optimizer, 2)
    assert list(found) == [1]
    assert sum(metric.cost(snapshot).values()) < costs[1]  # it is aligned by fewer products


# Error bars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.975, 0.999])
@pytest.mark.parametrize("degrees", [2, 4, 10, 200])
def test_student_quantile_is_scipys(confidence, degrees):
    assert student_quantile(confidence, degrees) == pytest.approx(stats.t.ppf(confidence, degrees), rel=1e-9)


@pytest.mark.parametrize("n", [3, 5, 50])
def test_student_bounds_are_scipys(n):
    values = random(n)
    mean, lower, upper = student_bounds(values, confidence=0.9)
    expected = stats.t.interval(0.8, n - 1, values.mean().item(), stats.sem(values.numpy()))
    close([mean, lower, upper], [values.mean(), *expected], 1e-6)


def test_student_bounds_cover_as_often_as_they_say():
    """4000 samples of 5 standard normals: each bound holds in 90 % (sd 0.5 %)."""
    bounds = [student_bounds(values) for values in random(4000, 5)]
    for covered in ([lower < 0 for _, lower, _ in bounds], [upper > 0 for _, _, upper in bounds]):
        assert abs(np.mean([bool(c) for c in covered]) - 0.9) < 0.02


@pytest.mark.parametrize("n", [0, 1, 2])
def test_below_three_values_there_is_no_bound(n):
    mean, lower, upper = student_bounds(torch.ones(n))
    assert lower.isnan() and upper.isnan() and (mean.isnan() if n == 0 else mean == 1.0)


def test_not_a_number_among_the_windows_is_not_hidden():
    assert all(value.isnan() for value in student_bounds(torch.tensor([0.1, math.nan, 0.3])))


def test_batch_means_know_of_correlation():
    series = ar1(300)
    mean, error = batch_means(series)
    close(mean, series.mean(0), 1e-14)
    expected, spread = AR1_BATCH_MEANS
    assert abs(error.mean() - expected) < 4 * spread / 300**0.5
    assert abs(mean.std() - AR1_STANDARD_ERROR) < 4 * AR1_STANDARD_ERROR / 600**0.5  # that is what it estimates
    naive = (series.std(0) / len(series) ** 0.5).mean()
    assert abs(naive - AR1_NAIVE) < 0.001 and error.mean() > 3.5 * naive


def test_batch_means_of_independent_values_are_the_naive_ones():
    values = random(2000, 200)
    _, error = batch_means(values)
    assert error.mean() == pytest.approx(float(values.std(0).mean()) / 2000**0.5, rel=0.05)
    close(batch_means(torch.ones(45))[1], 0.0, 0)
    with pytest.raises(ValueError, match="blocks=20"):
        batch_means(torch.ones(39))
