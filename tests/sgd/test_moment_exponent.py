"""Moment exponents against closed forms, dense tensor products, and all runs of a few steps."""

import importlib
import itertools
import math

import pytest
import torch
from frozen_sgd_cases import FOUR, RULES, TANH, f64, random, scalar, seeded, step_matrices

from lsp_callbacks.functional import UpdateRule, moment_exponent, reduced_modes, second_moment_exponent, sgd_exponent
from lsp_callbacks.functional.sgd.moment_exponent import COORDINATES, MODES

torch.set_num_threads(1)
moments = importlib.import_module("lsp_callbacks.functional.sgd.moment_exponent")  # the package has the function
DRAWS = ((1, False), (2, False), (2, True), (3, False), (3, True))


def kron_power(a, p):
    """``(batches, d^p, d^p)`` of ``(batches, d, d)``."""
    found = a
    for _ in range(p - 1):
        found = torch.einsum("bij,bkl->bikjl", found, a).reshape(
            len(a), found.shape[1] * a.shape[1], found.shape[2] * a.shape[2]
        )
    return found


def dense_exponent(a, p):
    """``log rho(E[A (x) ... (x) A])`` on all tensors, symmetric or not."""
    return math.log(float(torch.linalg.eigvals(kron_power(a, p).mean(0)).abs().max()))


def matrices(y, outputs, *draw):
    return torch.stack(list(step_matrices(y, outputs, *draw)))


# -- witnesses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [[1, 3], [0.5, 1.0, 2.5], [0.5, 1.0, 2.0, 4.5], [1, 1, 2, 3, 5, 8]], ids=len)
def test_one_parameter_in_closed_form(a):
    """``log E |1 - lr a_B|^p`` over every batch of every size."""
    modes, choose = scalar(a), {True: itertools.product, False: itertools.combinations}
    for size, replacement in itertools.product(range(1, len(a) + 1), (False, True)):
        if replacement and size > 4:
            continue
        batches = [b for b in (itertools.product(a, repeat=size) if replacement else choose[False](a, size))]
        for p, lr in itertools.product((2, 4), (0.1, 0.7, 1.3)):
            truth = math.log(sum(abs(1 - lr * sum(b) / size) ** p for b in batches) / len(batches))
            found = moment_exponent(modes, lr, p=p, batch_size=size, replacement=replacement)
            assert found == pytest.approx(truth, abs=1e-8), (size, replacement, p, lr)


@pytest.mark.parametrize("y, outputs", [(FOUR[:, :3], 1), (random(9, 4, seed=1), 3), (random(10, 2, seed=2), 2)])
def test_several_parameters_by_dense_products(y, outputs):
    modes = reduced_modes(y @ y.T, outputs)
    for size, replacement in DRAWS:
        for lr, rule in ((0.4, UpdateRule()), (0.2, RULES["plain, both decays"])):
            a = matrices(y, outputs, size, lr, rule, replacement)
            found = moment_exponent(modes, lr, p=4, batch_size=size, rule=rule, replacement=replacement)
            assert found == pytest.approx(dense_exponent(a, 4), abs=1e-8)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.momentum])
def test_momentum_by_dense_products(name):
    y, rule = random(5, 2, seed=3), RULES[name]
    modes = reduced_modes(y @ y.T)
    for (size, replacement), lr in itertools.product(DRAWS, (0.3, 1.5)):
        a = matrices(y, 1, size, lr, rule, replacement)
        found = {
            p: moment_exponent(modes, lr, p=p, batch_size=size, rule=rule, replacement=replacement) for p in (2, 4)
        }
        assert found[4] == pytest.approx(dense_exponent(a, 4), abs=1e-8)
        assert found[2] == pytest.approx(dense_exponent(a, 2), abs=1e-7)


@pytest.mark.parametrize("basis", [16, 24])
def test_where_the_iteration_starts_again_it_is_right_or_says_nothing(basis, monkeypatch):
    """An eigenvalue of condition 6,000: a small residual proves little."""
    monkeypatch.setattr(moments, "BASIS", basis)
    y, rule, known = random(5, 2, seed=3), RULES["adamw"], 0
    for size, lr in itertools.product((1, 2, 3), (0.3, 1.5)):
        found = moment_exponent(reduced_modes(y @ y.T), lr, p=4, batch_size=size, rule=rule)
        truth = dense_exponent(matrices(y, 1, size, lr, rule), 4)
        assert math.isnan(found) or found == pytest.approx(truth, abs=1e-8)
        known += math.isfinite(found)
    assert known


@pytest.mark.parametrize("p", [2, 4])
def test_all_runs_of_a_few_steps(p):
    """The mean power over each of 4^n runs grows by the factor in one more step."""
    modes, means = reduced_modes(TANH), []
    steps = torch.stack([torch.eye(4, dtype=torch.float64) - 0.35 * z.T @ z for z in modes.factor])
    v = modes.curvatures.sqrt()[None]
    for _ in range(9):
        v = torch.einsum("bij,nj->bni", steps, v).reshape(-1, 4)
        means.append(float(v.norm(dim=1).pow(p).mean()))
    factors = [math.log(after / before) for before, after in itertools.pairwise(means)]
    rest = abs(factors[-1] - factors[-2])
    assert rest < 1e-3
    assert moment_exponent(modes, 0.35, p=p, batch_size=1) == pytest.approx(factors[-1], abs=10 * rest)


def test_the_second_is_that_of_the_mean_square():
    modes = reduced_modes(TANH)
    for size, rule in itertools.product((1, 2), (UpdateRule(), UpdateRule(0.9))):
        second = second_moment_exponent(modes, 0.2, batch_size=size, rule=rule)
        assert moment_exponent(modes, 0.2, p=2, batch_size=size, rule=rule) == pytest.approx(2 * second, abs=1e-9)


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [UpdateRule(), UpdateRule(0.9), UpdateRule(0.5, nesterov=True)], ids=str)
def test_the_exponents_are_ordered_as_jensen_says(rule):
    for seed, size in itertools.product(range(3), (1, 2)):
        y = random(6, 3, seed=seed) * f64([1.0, 0.6, 1.5])
        modes = reduced_modes(y @ y.T)
        for lr in (0.05, 0.3, 0.9):
            least = sgd_exponent(modes, lr, batch_size=size, rule=rule, steps=400)
            second, fourth = (moment_exponent(modes, lr, p=p, batch_size=size, rule=rule) for p in (2, 4))
            assert float(least.value) <= second / 2 + 4 * float(least.error) + 1e-9
            assert second / 2 <= fourth / 4 + 1e-9


def test_rare_runs_explode_where_the_usual_one_converges():
    modes = scalar([0.5] * 9 + [4.0])
    second, fourth = (moment_exponent(modes, 0.7, p=p, batch_size=1) for p in (2, 4))
    assert float(sgd_exponent(modes, 0.7, batch_size=1).value) < 0 and second < 0 < fourth


@pytest.mark.parametrize("rule", [UpdateRule(), UpdateRule(0.9)], ids=str)
@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e100])
def test_units_of_the_rate_change_nothing(scale, rule):
    y = random(5, 3, seed=4)
    truth = moment_exponent(reduced_modes(y @ y.T), 0.3, p=4, batch_size=2, rule=rule)
    found = moment_exponent(reduced_modes(y @ y.T * scale), 0.3 / scale, p=4, batch_size=2, rule=rule)
    assert found == pytest.approx(truth, abs=1e-8)


@pytest.mark.parametrize("lr", [1e-9, 1e60])
def test_rates_far_from_the_edge(lr):
    modes = scalar([1.0, 2.0, 4.0])
    truth = 4 * math.log(lr) + math.log((1 + 16 + 256) / 3) if lr > 1 else -4 * lr * 7 / 3
    assert moment_exponent(modes, lr, p=4, batch_size=1) == pytest.approx(truth, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("p", [2, 4])
def test_a_population_is_that_of_all_its_samples(p):
    """Each probe stands for three training samples: batches of those, which may hold one of them twice."""
    y = random(4, 2, seed=5)
    every = y.repeat_interleave(3, 0)
    for size in (1, 2, 5):
        found = moment_exponent(reduced_modes(y @ y.T), 0.8, p=p, batch_size=size, population=12)
        assert found == pytest.approx(
            moment_exponent(reduced_modes(every @ every.T), 0.8, p=p, batch_size=size), abs=1e-8
        )
        a = matrices(every, 1, size, 0.8)
        assert found == pytest.approx(dense_exponent(a, p), abs=1e-8)


def test_without_noise_all_of_them_are_powers():
    modes = reduced_modes(TANH)
    for rule in (UpdateRule(), UpdateRule(0.9)):
        a = float(sgd_exponent(modes, 0.6, batch_size=4, rule=rule).value)
        for p in (2, 4):
            assert moment_exponent(modes, 0.6, p=p, batch_size=4, rule=rule) == pytest.approx(p * a, abs=1e-12)


def test_components_have_exponents_of_their_own():
    first, second = random(5, 3, seed=6), 0.8 * random(6, 2, seed=7)
    modes = reduced_modes(
        torch.block_diag(first @ first.T, second @ second.T)[(order := torch.randperm(11, generator=seeded()))][
            :, order
        ]
    )
    alone = []
    for block in (first, second):
        padded = torch.zeros(11, block.shape[1], dtype=torch.float64)
        padded[: len(block)] = block
        alone.append(dense_exponent(matrices(padded, 1, 2, 0.7), 4))
    assert moment_exponent(modes, 0.7, p=4, batch_size=2) == pytest.approx(max(alone), abs=1e-8)


def test_as_many_orthogonal_samples_as_one_likes():
    curvatures = torch.linspace(0.1, 2.0, 100, dtype=torch.float64)
    truth = max(math.log((99 + (1 - a) ** 4) / 100) for a in curvatures.tolist())
    assert moment_exponent(reduced_modes(torch.diag(curvatures)), 1.0, p=4, batch_size=1) == pytest.approx(
        truth, abs=1e-9
    )


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 1, 3, 2.5, 6, -2, math.nan])
def test_other_moments_are_refused(p):
    with pytest.raises(ValueError, match=r"p=.*only the moments 2 and 4 are exact"):
        moment_exponent(reduced_modes(TANH), 0.3, p=p, batch_size=1)


def test_what_is_too_large_is_refused():
    y = random(40, MODES + 1)
    modes = reduced_modes(y @ y.T)
    assert math.isfinite(moment_exponent(modes, 1e-3, p=2, batch_size=1))
    with pytest.raises(ValueError, match=r"25 coordinates.*fewer probes"):
        moment_exponent(modes, 1e-3, p=4, batch_size=1)
    with pytest.raises(ValueError, match="18 coordinates"):
        moment_exponent(reduced_modes(y[:, :9] @ y[:, :9].T), 1e-3, p=4, batch_size=1, rule=UpdateRule(0.9))
    assert (MODES, COORDINATES) == (24, 16)
    with pytest.raises(ValueError, match="batch_size=5"):
        moment_exponent(reduced_modes(TANH), 0.3, p=4, batch_size=5)
    with pytest.raises(ValueError, match="batch statistics"):
        moment_exponent(reduced_modes(TANH, together=2), 0.3, p=4, batch_size=2)


def test_a_dead_network_has_none():
    assert math.isnan(moment_exponent(reduced_modes(torch.zeros(3, 3)), 0.1, p=4, batch_size=1))


def test_steps_that_annihilate():
    assert moment_exponent(scalar([2.0, 2.0]), 0.5, p=4, batch_size=1) == -math.inf
