import math

import numpy as np
import pytest
import torch
from problems import (
    GAUSSIAN_EXPONENTS,
    JORDAN,
    JORDAN_NORMS,
    POSITIVE_PAIR,
    POSITIVE_PAIR_EXPONENT,
    close,
    f64,
    matrix,
    random,
    symmetric,
)
from scipy.sparse.linalg import LinearOperator as SciPyOperator
from scipy.sparse.linalg import eigsh, svds

from lsp_callbacks.functional import batch_means
from lsp_callbacks.linalg import (
    LinearOperator,
    from_matrix,
    identity_like,
    lanczos,
    lyapunov_exponents,
    norm_upper,
    operator_norm,
    orthonormalise,
    push,
    spectral_radius,
    spectrum_bounds,
)

SPECTRA = {
    "spread": [-7.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0],
    "top_repeated": [-1.0, 0.0, 2.0, 4.0, 4.0, 4.0],
    "bottom_larger_in_magnitude": [-100.0, -3.0, 0.1, 1.0],
    "negative_definite": [-9.0, -4.0, -1.0, -0.25],
    "identity": [3.0] * 5,
    "rank_one": [0.0] * 6 + [2.0],
    "zero": [0.0] * 4,
    "one_dimension": [-2.5],
}


# Operators ----------------------------------------------------------------------------------------------------------


def test_algebra_is_that_of_matrices():
    A, B, scale = random(4, 3, seed=1), random(3, 4, seed=2), random(4, seed=3)
    a, b = from_matrix(A), from_matrix(B)
    for operator, dense in [
        (a, A),
        (a @ b, A @ B),
        (b @ a, B @ A),
        (a + b.T, A + B.T),
        (2.5 * a, 2.5 * A),
        (scale * a, scale[:, None] * A),
        (identity_like(a @ b), torch.eye(4, dtype=f64)),
        (identity_like(a @ b) + (-1.0 * (a @ b)), torch.eye(4, dtype=f64) - A @ B),
    ]:
        assert operator.shape == tuple(dense.shape)
        close(operator.dense(), dense, 1e-14)
        close(operator.T.dense(), dense.T, 1e-14)


def test_a_batch_is_a_family_of_matrices():
    A = random(5, 4, 3)
    close(from_matrix(A).dense(), A, 1e-14)
    close((from_matrix(A).T @ from_matrix(A)).dense(), A.mT @ A, 1e-14)


def test_an_unknown_adjoint_stays_unknown():
    forward = LinearOperator((3, 3), lambda x: 2 * x, dtype=f64)
    for operator in (forward, forward @ forward, forward + forward, 2.0 * forward):
        with pytest.raises(ValueError, match="adjoint"):
            _ = operator.T


# Krylov -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_both_ends(name, dtype):
    A = symmetric(SPECTRA[name]).to(dtype)
    run = lanczos(from_matrix(A), random(len(A), seed=5).to(dtype), steps=len(A), tol=0.0, ends=(0, -1))
    eps = 50 * torch.finfo(dtype).eps * max(1.0, max(map(abs, SPECTRA[name])))
    assert run.converged
    close(run.values[[0, -1]], [min(SPECTRA[name]), max(SPECTRA[name])], eps)
    top = run.pair(-1)
    close(torch.linalg.vector_norm(top.vector), 1.0, eps)
    close(torch.linalg.vector_norm(A @ top.vector - top.value * top.vector), 0.0, eps)


def test_lanczos_agrees_with_scipy_on_a_large_operator():
    spectrum = np.concatenate([np.linspace(-2, 1, 297), [2.0, 3.0, 4.0]])
    A = symmetric(list(spectrum))
    run = lanczos(from_matrix(A), random(300, seed=5), steps=60, tol=1e-9)
    (theirs,) = eigsh(SciPyOperator(A.shape, matvec=A.numpy().dot), k=1, which="LA", return_eigenvectors=False)
    assert run.converged and len(run.basis) < 60
    close(run.values[-1], theirs, 1e-12)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_residuals_are_exact_also_where_unconverged(steps):
    A = symmetric(SPECTRA["spread"])
    run = lanczos(from_matrix(A), random(8, seed=5), steps=steps, tol=0.0)
    assert not run.converged
    for index in range(steps):
        pair = run.pair(index)
        close(torch.linalg.vector_norm(A @ pair.vector - pair.value * pair.vector), pair.residual, 1e-12)
        assert (torch.linalg.eigvalsh(A) - pair.value).abs().min() <= pair.residual + 1e-12


@pytest.mark.parametrize("end, value", [(-1, 5.0), (0, -7.0)])
@pytest.mark.parametrize("index", range(8))
def test_a_start_that_is_an_eigenvector_cannot_hide_the_top(index, end, value):
    A = torch.diag(torch.tensor(SPECTRA["spread"], dtype=f64))
    run = lanczos(from_matrix(A), torch.eye(8, dtype=f64)[index], steps=8, tol=1e-6, ends=(end,))
    assert run.converged
    close(run.values[end], value, 1e-10)


def test_a_start_in_an_invariant_subspace_cannot_hide_the_top():
    spectrum = torch.cat([torch.linspace(0, 1, 40, dtype=f64), torch.tensor([5.0, 6.0, 10.0], dtype=f64)])
    start = torch.zeros(43, dtype=f64)
    start[[0, 20, 41]] = 1.0
    assert lanczos(from_matrix(torch.diag(spectrum)), start, steps=30, tol=1e-6).values[-1] == pytest.approx(10, 1e-9)


def test_a_zero_start_is_replaced():
    A = symmetric(SPECTRA["spread"])
    close(lanczos(from_matrix(A), torch.zeros(8, dtype=f64), steps=8, tol=0.0).values[-1], 5.0, 1e-12)


def test_a_batch_of_operators_agrees_with_a_loop():
    A = torch.stack([symmetric(s, seed=i) for i, s in enumerate([[1.0, 2.0, 3.0], [-5.0, -4.0, 9.0], [0.0] * 3])])
    start = random(3, 3, seed=7)
    together = lanczos(from_matrix(A), start, steps=3, ends=(0, -1))
    close(together.values[:, [0, -1]], torch.linalg.eigvalsh(A)[:, [0, -1]], 1e-12)
    for matrix_, vector in zip(A, together.pair(-1).vector):
        close(matrix_ @ vector, torch.linalg.eigvalsh(matrix_)[-1] * vector, 1e-10)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (1, 1), (60, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_operator_norm_is_the_largest_singular_value(shape, dtype):
    A = random(*shape).to(dtype)
    found = operator_norm(from_matrix(A), steps=shape[1], tol=1e-8)
    tol = 20 * torch.finfo(dtype).eps
    close(found.value, torch.linalg.matrix_norm(A.double(), 2), tol if min(shape) < 10 else 1e-6)
    if min(shape) > 1:
        (theirs,) = svds(A.double().numpy(), k=1, return_singular_vectors=False)
        assert float(found.value) <= theirs * (1 + tol)
    close(torch.linalg.vector_norm(A @ found.vector), found.value, tol)


def test_operator_norm_residual_and_lower_bound_before_convergence():
    A = random(60, 40)
    for steps in (2, 5, 10):
        found = operator_norm(from_matrix(A), steps=steps, tol=0.0)
        s, v = found.value, found.vector
        assert not found.converged and s <= torch.linalg.matrix_norm(A, 2)
        close(torch.linalg.vector_norm(A.T @ (A @ v) - s**2 * v) / (2 * s), found.residual, 1e-10)
        assert (torch.linalg.svdvals(A) - s).abs().min() <= 2 * found.residual


def test_a_warm_start_saves_products():
    A = random(60, 40)
    cold = operator_norm(from_matrix(A), steps=40, tol=1e-6)
    warm = operator_norm(from_matrix(A + 1e-3 * random(60, 40, seed=1)), cold.vector, steps=40, tol=1e-3)
    assert warm.converged and warm.products < cold.products / 2


# Bounds from above ---------------------------------------------------------------------------------------------------

#: What Lanczos finds hard: no gap, Chebyshev's points (the worst for a polynomial), a top one that hides.
HARD = {
    "uniform": torch.linspace(0, 1, 200, dtype=f64),
    "chebyshev": 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(200, dtype=f64) + 0.5) / 200),
    "nearly hidden": torch.cat([torch.linspace(0, 0.99, 199, dtype=f64), torch.ones(1, dtype=f64)]),
    "decaying": torch.logspace(-4, 0, 200, dtype=f64),
    "far apart": torch.cat([torch.linspace(-0.1, 0.1, 197, dtype=f64), torch.tensor([-2.0, 5.0, 30.0], dtype=f64)]),
}


def family(spectrum, starts):
    """One diagonal operator as a batch, and as many random starts."""
    A = LinearOperator((len(spectrum),) * 2, lambda x: spectrum * x, lambda x: spectrum * x, batch=(starts,), dtype=f64)
    return A, random(starts, len(spectrum), seed=4)


@pytest.mark.parametrize("name", HARD)
def test_bounds_of_the_spectrum_fail_as_rarely_as_they_say(name):
    spectrum = HARD[name].sort().values
    A, start = family(spectrum, 2000)
    for steps, failure in [(2, 1e-2), (8, 0.1), (8, 1e-2), (20, 0.1), (20, 1e-2)]:
        ritz = lanczos(A, start, steps=steps, tol=0.0)
        low, high = spectrum_bounds(ritz, failure=failure)
        for missed in (high < spectrum[-1], low > spectrum[0]):
            assert missed.double().mean() <= failure + 4 * (failure / 2000) ** 0.5
        assert (high >= ritz.values[:, -1]).all() and (low <= ritz.values[:, 0]).all()
        if spectrum[0] >= 0:  # never above what Kuczynski & Wozniakowski have for the worst of all spectra
            defect = (math.log(1.648 * 200**0.5 / failure) / (2 * steps - 1)) ** 2
            assert defect >= 1 or (high <= ritz.values[:, -1] / (1 - defect)).all()


def test_bounds_are_missed_as_often_as_they_may_be():
    """The probability is not a safe guess: where the top hides, one start in ten is too nearly orthogonal to it."""
    spectrum = HARD["nearly hidden"]
    _, high = spectrum_bounds(lanczos(*family(spectrum, 2000), steps=40, tol=0.0), failure=0.1)
    assert 0.06 < (high < 1).double().mean() < 0.12 and high.median() < 1.01


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_of_small_matrices_are_their_ends(name, dtype):
    A = symmetric(SPECTRA[name]).to(dtype)
    true = torch.linalg.eigvalsh(symmetric(SPECTRA[name]))
    for steps in range(1, len(A) + 1):
        low, high = spectrum_bounds(lanczos(from_matrix(A), random(len(A), seed=5).to(dtype), steps=steps, tol=0.0))
        assert low <= true[0] and true[-1] <= high
    eps = max(1e-7, 100 * torch.finfo(dtype).eps) * float(true.abs().max().clamp_min(1))
    close(torch.stack([low, high]), true[[0, -1]], eps)


def test_a_start_in_an_invariant_subspace_has_its_own_bounds():
    """Lanczos goes on in a fresh direction; the bounds hold all that it has seen."""
    A = torch.diag(torch.tensor([1.0, 2.0, 2.0, 2.0, 7.0], dtype=f64))
    start = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=f64)
    low, high = spectrum_bounds(lanczos(from_matrix(A), start, steps=4, tol=0.0))
    assert low <= 1 and high >= 7


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (3, 300), (300, 1), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_norms_from_above(shape, dtype):
    A = random(*shape).to(dtype)
    true = torch.linalg.matrix_norm(A.double(), 2)
    for steps in (3, 8, 30):
        bound = norm_upper(from_matrix(A), steps=steps)
        assert true <= bound <= true * (1 + 1e-5 if steps >= min(shape) else {3: 9, 8: 1.2, 30: 1.05}[steps])
    pair = torch.stack([A, 2 * A])
    close(norm_upper(from_matrix(pair)) / true, [1.0, 2.0], 0.1)


@pytest.mark.parametrize("c", [10.0**k for k in range(-15, 16, 5)])
def test_norms_have_no_unit(c):
    """In float32, though the squares of what Lanczos on ``A^T A`` sees, ``c^4``, are out of its range."""
    A = random(60, 40).float()
    true = torch.linalg.matrix_norm(A.double(), 2)
    scaled = from_matrix(c * A)
    close(operator_norm(scaled, steps=40, tol=1e-6).value / c, true, 1e-4)
    for steps in (3, 8, 30, 40):
        bound = norm_upper(scaled, steps=steps) / c
        assert true * (1 - 1e-6) <= bound
        close(bound / norm_upper(from_matrix(A), steps=steps), 1.0, 1e-3)


def test_bounds_of_small_operators_are_exact_whatever_the_tolerance():
    """Lanczos would stop long before, where a bound is still far above the value."""
    A = random(40, 12)
    true = torch.linalg.matrix_norm(A, 2)
    close(operator_norm(from_matrix(A), steps=12, tol=0.1, failure=1e-3).upper, true, 1e-9)
    assert operator_norm(from_matrix(A), steps=11, tol=0.1, failure=1e-3).upper > 1.01 * true


def test_only_a_random_start_gives_a_bound():
    A = from_matrix(random(4, 4))
    assert operator_norm(A).upper is None and operator_norm(A, failure=0.1).upper is not None
    with pytest.raises(ValueError, match="random start"):
        operator_norm(A, torch.ones(4, dtype=f64), failure=0.1)
    with pytest.raises(ValueError, match="probability"):
        norm_upper(A, failure=0.0)
    assert norm_upper(from_matrix(torch.full((3, 3), math.nan))).isnan() and norm_upper(0.0 * A) == 0


def test_zero_operator_has_norm_zero():
    found = operator_norm(from_matrix(torch.zeros(3, 5, dtype=f64)))
    assert (float(found.value), float(found.residual), found.converged) == (0.0, 0.0, True)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_a_number_stays_one(poison):
    A = torch.eye(4, dtype=f64)
    A[1, 2] = A[2, 1] = poison
    run = lanczos(from_matrix(A), torch.ones(4, dtype=f64), steps=4)
    norm = operator_norm(from_matrix(A))
    assert run.values.isnan().all() and not run.converged
    assert norm.value.isnan() and norm.residual.isnan() and not norm.converged
    assert spectral_radius(A).isnan()


def test_random_choices_leave_the_global_state_alone():
    before = torch.get_rng_state()
    lanczos(from_matrix(torch.eye(4)), torch.ones(4), steps=4)
    operator_norm(from_matrix(torch.eye(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_spectral_radius_of_a_rotation():
    close(spectral_radius(matrix([[0.0, -0.5], [0.5, 0.0]])), 0.5, 1e-14)


# Cocycles -----------------------------------------------------------------------------------------------------------


def test_orthonormal_in_the_weighted_norm():
    frame, weight = random(3, 5), random(5, seed=1).abs() + 0.1
    new, logs = orthonormalise(frame, weight)
    close((new * weight) @ (new * weight).T, torch.eye(3, dtype=f64), 1e-13)
    volume = torch.linalg.det((frame * weight) @ (frame * weight).T).sqrt()
    close(logs.sum(), volume.log(), 1e-12)


def test_jordan_block_grows_without_an_exponent():
    product, frame = torch.eye(2, dtype=f64), torch.eye(2, dtype=f64)
    for step in range(1, 1001):
        product = push(from_matrix(JORDAN), product)
        if step in JORDAN_NORMS:
            close(torch.linalg.matrix_norm(product, 2), JORDAN_NORMS[step], 1e-12)
    rates = lyapunov_exponents([from_matrix(JORDAN)] * 2000, frame, transient=1000).mean(0)
    close(rates, [0.0, 0.0], math.log(2) / 1000)  # log(2000 / 1000) / 1000: the growth is polynomial


def test_exponents_of_a_constant_matrix_are_the_logs_of_its_eigenvalues():
    A = from_matrix(symmetric([0.1, -0.5, 2.0, 1.0]))
    rates = lyapunov_exponents([A] * 300, random(3, 4), transient=250)
    close(rates.mean(0), np.log([2.0, 1.0, 0.5]), 1e-12)
    with pytest.raises(ValueError, match="transient=3"):
        lyapunov_exponents([A] * 3, random(1, 4), transient=3)


def test_a_weight_changes_the_transient_and_not_the_exponent():
    A, weight = from_matrix(random(3, 3)), torch.tensor([1.0, 10.0, 0.1], dtype=f64)
    plain, weighted = (lyapunov_exponents([A] * 4000, random(1, 3), weight=w) for w in (1.0, weight))
    assert (plain[0] - weighted[0]).abs() > 0.01
    close(plain.mean(), weighted.mean(), 1e-2)


def _monte_carlo(matrices, expected, transient=50):
    """The exponents agree with their exact values within four of their own standard errors."""
    rates = lyapunov_exponents(map(from_matrix, matrices), torch.eye(2, dtype=f64), transient=transient)
    mean, error = batch_means(rates)
    for index, value in enumerate(expected):
        assert abs(mean[index] - value) < 4 * error[index]
    return rates, error


def test_exponent_of_a_product_of_positive_matrices():
    draws = torch.randint(2, (4000,), generator=torch.Generator().manual_seed(0))
    rates, error = _monte_carlo([POSITIVE_PAIR[i] for i in draws], [POSITIVE_PAIR_EXPONENT])
    assert error[0] < 0.01
    determinants = torch.stack([torch.linalg.det(POSITIVE_PAIR[i]) for i in draws[50:]])
    close(rates.sum(1), determinants.log(), 1e-9)


def test_exponents_of_gaussian_products():
    matrices = random(6000, 2, 2)
    rates, error = _monte_carlo(matrices, GAUSSIAN_EXPONENTS)
    assert error.max() < 0.03
    close(rates.sum(1), torch.linalg.det(matrices[50:]).abs().log(), 1e-9)


@pytest.mark.parametrize("value, rate", [(0.0, -math.inf), (math.nan, math.nan)])
def test_degenerate_exponents(value, rate):
    A = from_matrix(torch.full((2, 2), value, dtype=f64))
    assert lyapunov_exponents([A], torch.eye(2, dtype=f64))[0, 0].item() == pytest.approx(rate, nan_ok=True)
