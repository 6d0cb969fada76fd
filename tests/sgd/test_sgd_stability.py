import itertools
import math
from dataclasses import replace

import pytest
import torch
from frozen_sgd_cases import FOUR, RULES, TANH, f64, random, scalar, seeded, step_matrices

from lsp_callbacks.functional import (
    UpdateRule,
    finite_time_exponents,
    gd_exponent,
    reduced_modes,
    regularity,
    sgd_exponent,
    sum_of_exponents,
)
from lsp_callbacks.functional.sgd.mean_square import (
    gd_critical_lr,
    mean_square_lr,
    second_moment,
    second_moment_exponent,
)
from lsp_callbacks.functional.sgd.sgd_stability import critical_lr
from lsp_callbacks.functional.sgd.stability_diagram import stability_diagram

torch.set_num_threads(1)


def agrees(found, value, sd=0.0):
    """Within 4 standard errors of the estimate and of the stated value."""
    assert found.error < 0.01
    assert abs(float(found.value) - value) <= 4 * (float(found.error) + sd) + 1e-9, (found, value)


def regression():
    i, j = torch.arange(6, dtype=torch.float64)[:, None], torch.arange(20, dtype=torch.float64)
    x = torch.cos(1.3 * (i + 1) * (j + 1).sqrt()) * (1 + 0.3 * i)
    return reduced_modes(x @ x.T)


# Dense brute force over every batch, in the coordinates of Y.


def dense_factor(y, outputs, batch_size, lr, rule, replacement):
    """The spectral radius of ``E[A (x) A]``."""
    a = torch.stack(list(step_matrices(y, outputs, batch_size, lr, rule, replacement)))
    t = torch.einsum("bij,bkl->ikjl", a, a) / len(a)
    return float(torch.linalg.eigvals(t.reshape(a.shape[1] ** 2, -1)).abs().max())


PROBLEMS = {"c = 1": (FOUR, 1), "c = 3": (random(9, 5, seed=1), 3)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", RULES)
def test_mean_square_lr_is_the_dense_edge(name, problem):
    rule, (y, outputs) = RULES[name], PROBLEMS[problem]
    modes = reduced_modes(y @ y.T, outputs)
    for batch_size, replacement in ((1, False), (2, False), (2, True)):
        lr = mean_square_lr(modes, batch_size=batch_size, rule=rule, replacement=replacement, tol=1e-10)

        def factor(rate, batch_size=batch_size, replacement=replacement):
            return dense_factor(y, outputs, batch_size, rate, rule, replacement)

        assert factor(lr * (1 - 1e-8)) < 1 < factor(lr * (1 + 1e-8))
        # The smallest such rate: stable all the way up.
        assert all(factor(lr * share) < 1 for share in (0.01, 0.2, 0.4, 0.6, 0.8, 0.95))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", RULES)
def test_second_moment_exponent_is_the_dense_one(name, problem):
    rule, (y, outputs) = RULES[name], PROBLEMS[problem]
    modes = reduced_modes(y @ y.T, outputs)
    for batch_size, replacement in ((1, False), (2, False), (2, True)):
        lr = 0.9 * mean_square_lr(modes, batch_size=batch_size, rule=rule, replacement=replacement)
        dense = 0.5 * math.log(dense_factor(y, outputs, batch_size, lr, rule, replacement))
        exponent = second_moment_exponent(modes, lr, batch_size=batch_size, rule=rule, replacement=replacement)
        assert exponent == pytest.approx(dense, abs=1e-7)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("replacement", [False, True])
def test_second_moment_operator_is_the_mean_over_batches(outputs, replacement):
    y = random(12, 7, seed=2)
    modes = reduced_modes(y @ y.T, outputs)
    x = random(modes.rank, modes.rank, seed=3)
    x = x + x.T
    z, wd = modes.factor, 0.3
    for batch_size in (1, 2, 3):
        index = range(modes.samples)
        choose = itertools.product(index, repeat=batch_size)
        batches = list(choose if replacement else itertools.combinations(index, batch_size))
        hessians = [
            sum(z[i].T @ z[i] for i in b) / batch_size + wd * torch.eye(modes.rank, dtype=x.dtype) for b in batches
        ]
        expected = sum(h @ x @ h for h in hessians) / len(batches)
        found = second_moment(modes, batch_size, replacement, weight_decay=wd)(x)
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_scalar_two_samples():
    modes = scalar([1, 3])
    agrees(sgd_exponent(modes, 0.9, batch_size=1, steps=4000), -0.8859784209659377)
    assert second_moment_exponent(modes, 0.9, batch_size=1) == pytest.approx(0.1857817782162416, abs=1e-12)
    both = sgd_exponent(modes, 0.9, batch_size=1, sampling="reshuffle")
    # Every epoch multiplies by the same two numbers.
    assert float(both.value) == pytest.approx(-0.8859784209659376, abs=1e-12)


def test_scalar_four_samples():
    modes = scalar([0.5, 1.0, 2.0, 4.5])
    agrees(sgd_exponent(modes, 0.7, batch_size=2, steps=4000), -0.9903852875820714)
    agrees(sgd_exponent(modes, 0.7, batch_size=2, replacement=True, steps=4000, chains=64), -0.8543876288211146)
    for replacement, factor, lr in (
        (False, 0.5479166666666666, 0.8347826086956521),
        (True, 0.741875, 0.7710843373493976),
    ):
        exponent = second_moment_exponent(modes, 0.7, batch_size=2, replacement=replacement)
        assert math.exp(2 * exponent) == pytest.approx(factor, rel=1e-12)
        assert mean_square_lr(modes, batch_size=2, replacement=replacement) == pytest.approx(lr, rel=1e-10)
    assert float(gd_exponent(modes, 0.7)) == pytest.approx(-0.9162907318741553, abs=1e-12)
    for lr in (4 / 13, 4 / 11, 0.4, 2 / 3, 0.8, 4 / 3):
        assert float(sgd_exponent(modes, lr, batch_size=2).value) == -math.inf


def test_orthogonal_samples_are_components_with_exponents_of_their_own():
    modes = reduced_modes(torch.diag(f64([1.0, 2.0, 5.0, 0.4])))
    assert [c.tolist() for c in modes.components] == [[0], [1], [2], [3]]
    for batch_size, lr, lyapunov, gd, second in (
        (1, 0.3, -0.03195834287747122, -0.030459207484708574, -0.02902646572430855),
        (2, 0.6, -0.06391668575494244, -0.06187540371808753, -0.05984242147298989),
    ):
        agrees(sgd_exponent(modes, lr, batch_size=batch_size, steps=4000), lyapunov)
        assert float(gd_exponent(modes, lr)) == pytest.approx(gd, abs=1e-12)
        assert second_moment_exponent(modes, lr, batch_size=batch_size) == pytest.approx(second, abs=1e-9)


def test_a_component_that_starts_small_is_not_hidden_by_one_that_starts_large():
    modes = reduced_modes(torch.diag(f64([1.0, 1e-6])))
    # The large one shrinks by 5 % a step; 20 steps are too few for the small one to show beside it in a common norm.
    found = sgd_exponent(modes, 0.1, batch_size=1, steps=20, burn_in=0)
    assert -1e-6 < float(found.value) < 0


def test_components_do_not_see_each_other():
    first, second = random(5, 4, seed=4), 0.8 * random(6, 8, seed=5)
    gram = torch.block_diag(first @ first.T, second @ second.T)
    order = torch.randperm(11, generator=seeded(1))
    modes = reduced_modes(gram[order][:, order])
    assert sorted(len(c) for c in modes.components) == [5, 6]
    assert modes.rank == 4 + 6
    # Whichever part is the larger, it is what a run of its own gives: a part's sample is drawn with its share.
    found = sgd_exponent(modes, 0.1, batch_size=1, steps=4000)
    alone = []
    for block in (first, second):
        padded = torch.zeros(11, block.shape[1], dtype=torch.float64)
        padded[: len(block)] = block
        alone.append(sgd_exponent(reduced_modes(padded @ padded.T), 0.1, batch_size=1, steps=4000, generator=seeded(3)))
    top = max(alone, key=lambda e: float(e.value))
    agrees(found, float(top.value), float(top.error))


def test_two_and_three_unit_samples():
    two = reduced_modes(f64([[1, 0.8], [0.8, 1]]))
    agrees(sgd_exponent(two, 1.0, batch_size=1, steps=4000), -0.11157177565710485)
    assert second_moment_exponent(two, 1.0, batch_size=1) == pytest.approx(-0.09922546936191909, abs=1e-10)
    assert float(gd_exponent(two, 1.0)) == pytest.approx(-0.10536051565782628, abs=1e-12)
    angles = f64([0.0, 0.5, 1.3])
    y = torch.stack([angles.cos(), angles.sin()], 1)
    agrees(sgd_exponent(reduced_modes(y @ y.T), 1.0, batch_size=1, steps=4000), -0.40235890641871896)
    # Every step with one sample alone annihilates it: not regular in the sense of definition 2.2.
    margin, components = regularity(y @ y.T, 1.0)
    assert margin == pytest.approx(0, abs=1e-12)
    assert components == 1


def test_momentum_quadratic():
    heavy = UpdateRule(0.9)
    for curvature, exponent in ((5, -0.0526803), (0.02, -0.0268417), (39, 0.2747699)):
        assert float(gd_exponent(scalar([curvature]), 0.1, rule=heavy)) == pytest.approx(exponent, abs=1e-7)
    for rule, edge in (
        (heavy, 3.8),
        (UpdateRule(0.9, nesterov=True), 1.357142857142857),
        (UpdateRule(0.9, dampening=0.9), 38.0),
    ):
        modes = scalar([1.0])
        assert gd_critical_lr(modes, rule) == pytest.approx(edge, rel=1e-12)
        assert float(gd_exponent(modes, edge * (1 - 1e-9), rule=rule)) < 0
        assert float(gd_exponent(modes, edge * (1 + 1e-9), rule=rule)) > 0


def test_momentum_mean_square_lr():
    modes = scalar([1, 3])
    for beta, lr in ((0.0, 0.8), (0.5, 0.8571428571428571), (0.9, 0.3304347826086956)):
        assert mean_square_lr(modes, batch_size=1, rule=UpdateRule(beta)) == pytest.approx(lr, rel=1e-12)
    four = reduced_modes(FOUR @ FOUR.T)
    for batch_size, beta, lr in (
        (1, 0.5, 0.2978132),
        (1, 0.9, 0.0709314),
        (2, 0.5, 0.7356361),
        (2, 0.9, 0.2127766),
        (4, 0.5, 2.3633693),
        (4, 0.9, 2.9936011),
    ):
        assert mean_square_lr(four, batch_size=batch_size, rule=UpdateRule(beta)) == pytest.approx(lr, abs=6e-8)


def test_four_samples_three_parameters():
    modes = reduced_modes(FOUR @ FOUR.T)
    assert modes.rank == 3
    for batch_size, lr in ((1, 0.4751975), (2, 0.9061463), (3, 1.2801582), (4, 1.5755795)):
        assert mean_square_lr(modes, batch_size=batch_size) == pytest.approx(lr, abs=6e-8)
    assert mean_square_lr(modes, batch_size=2, replacement=True) == pytest.approx(0.7397047, abs=6e-8)
    for batch_size, factor in ((1, 1.0617279), (2, 0.6270202), (3, 0.6177955), (4, 0.6148758)):
        assert math.exp(2 * second_moment_exponent(modes, 0.5, batch_size=batch_size)) == pytest.approx(
            factor, abs=1e-7
        )
    for batch_size, value, sd, total in ((1, 0.012719, 6e-6, -0.8393392), (2, -0.25238, 4e-5, -1.756208)):
        found = sgd_exponent(modes, 0.5, batch_size=batch_size, steps=4000, chains=64)
        agrees(found, value, sd)
        exact = sum_of_exponents(modes, 0.5, batch_size=batch_size)
        assert float(exact.value) == pytest.approx(total, abs=1e-6)
        assert float(exact.error) == 0
        drawn = sum_of_exponents(modes, 0.5, batch_size=batch_size, exact=0, draws=20000)
        assert abs(float(drawn.value - exact.value)) <= 4 * float(drawn.error)
        assert float(found.value) >= float(exact.value) / modes.rank


def test_overparameterised_regression():
    modes = regression()
    agrees(sgd_exponent(modes, 0.03, batch_size=1, steps=4000), -0.015659, 7e-6)
    agrees(sgd_exponent(modes, 0.05, batch_size=1, steps=4000, chains=32), 0.10583, 2e-5)
    assert float(gd_exponent(modes, 0.03)) == pytest.approx(-0.015457228088405162, abs=1e-10)
    assert second_moment_exponent(modes, 0.05, batch_size=1) == pytest.approx(0.184176, abs=1e-6)
    for batch_size, lr in ((1, 0.034514), (2, 0.0686415), (3, 0.1022946), (6, 0.1922305)):
        assert mean_square_lr(modes, batch_size=batch_size) == pytest.approx(lr, abs=6e-7)


def test_tanh_network_at_interpolation():
    modes = reduced_modes(TANH)
    assert float(modes.curvatures[0]) == pytest.approx(3.8207521245901077, rel=1e-12)
    assert modes.trace == pytest.approx(5.796040125234767, rel=1e-12)
    agrees(sgd_exponent(modes, 0.35, batch_size=1, steps=8000, chains=32), 0.023802, 8e-6)
    agrees(sgd_exponent(modes, 0.35, batch_size=2, steps=8000, chains=32), -0.02178, 1e-5)
    assert float(gd_exponent(modes, 0.35)) == pytest.approx(-0.021580239529324852, abs=1e-10)


def test_reshuffling_changes_the_sign_of_lambda():
    modes = reduced_modes(FOUR @ FOUR.T)
    found = sgd_exponent(modes, 0.5, batch_size=1, sampling="reshuffle", steps=8000, chains=64)
    agrees(found, -0.00029, 1e-5)
    assert found.value < 0


def test_critical_lr_is_the_smallest_of_two_crossings():
    modes = scalar([1, 10])
    for lr, sign in ((0.2, -1), (0.25, 1), (0.8, 1), (0.9, -1), (1.05, -1)):
        assert float(sgd_exponent(modes, lr, batch_size=1, chains=32).value) * sign > 0
    found = critical_lr(modes, batch_size=1, steps=1000)
    assert found.mean_square <= found.value
    assert found.value == pytest.approx(0.2298, abs=4 * found.error + 0.002)
    # From a start inside of the upper stable interval the lower one stays invisible.
    assert critical_lr(modes, batch_size=1, start=0.9).value > 1
    gd = critical_lr(modes, batch_size=2)
    assert (gd.value, gd.error) == (pytest.approx(2 / 5.5), 0)


@pytest.mark.parametrize("rule", [UpdateRule(), UpdateRule(0.9), UpdateRule(0.9, 0.9, correction=0.5)])
def test_critical_lr_is_where_a_long_run_changes_sign(rule):
    modes = reduced_modes(FOUR @ FOUR.T)
    found = critical_lr(modes, batch_size=2, rule=rule, steps=1500)
    assert found.mean_square < found.value
    # With momentum lambda crosses zero at a small slope: the same noise moves the zero further.
    assert 0 < found.error < 0.05 * found.value
    sides = found.value + f64([-1, 1]) * max(4 * found.error, 0.05 * found.value)
    around = sgd_exponent(modes, sides, batch_size=2, rule=rule, steps=3000, chains=16, generator=seeded(4))
    assert float(around.value[0]) < 0 < float(around.value[1])


def test_dead_network_has_no_exponent_and_no_edge():
    modes = reduced_modes(torch.zeros(6, 6), 2)
    assert (modes.rank, modes.trace, modes.samples) == (0, 0.0, 3)
    assert math.isnan(sgd_exponent(modes, 0.7, batch_size=1).value)
    assert math.isnan(gd_exponent(modes, 0.7))
    assert math.isnan(second_moment_exponent(modes, 0.7, batch_size=1))
    assert finite_time_exponents(modes, 0.7, horizon=3, batch_size=1).isnan().all()
    assert mean_square_lr(modes, batch_size=1) == critical_lr(modes, batch_size=1).value == math.inf


def test_collapsed_network_looks_stable_but_has_rank_one():
    """A dead ReLU before a bias: every sample has the same Jacobian."""
    modes = reduced_modes(torch.ones(5, 5))
    assert (modes.rank, modes.trace) == (1, pytest.approx(1.0))
    assert float(sgd_exponent(modes, 0.7, batch_size=2).value) == pytest.approx(-1.2039728043259361, abs=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_reduced_product_is_the_parameter_space_product(name):
    """A tanh network at interpolation, explicit Jacobian, the start in the range of its transpose."""
    rule = RULES[name]
    width, theta, x = 4, random(12, seed=6), random(5, 2, seed=7)

    def outputs(p):
        return torch.tanh(x @ p[:8].view(2, width)) @ p[8:].view(width, 1)

    z = torch.autograd.functional.jacobian(outputs, theta)[:, 0]
    modes = reduced_modes(z @ z.T)
    lr = 0.8 * mean_square_lr(modes, batch_size=1, rule=rule)
    start = torch.ones(modes.rank, dtype=torch.float64) * modes.curvatures
    found = sgd_exponent(
        modes,
        lr,
        batch_size=1,
        rule=rule,
        sampling="reshuffle",
        chains=1,
        steps=200,
        burn_in=0,
        start=start,
        generator=seeded(5),
    )
    # The same permutations, from the same generator.
    order = torch.rand(40, 1, 5, generator=seeded(5)).argsort(-1).flatten()
    matrices = list(step_matrices(z, 1, 1, lr, rule))
    embed = z.T @ modes.factor[:, 0] / (5 * modes.curvatures)
    v = embed @ (start / start.norm())
    assert v.norm() == pytest.approx(1, abs=1e-12)
    state = torch.cat([v, torch.zeros_like(v)]) if rule.momentum else v
    for i in order:
        state = matrices[int(i)] @ state
    if rule.momentum:
        state = torch.cat([state[:12], lr * state[12:]])
    assert float(found.value) == pytest.approx(float(state.norm().log()) / 200, abs=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_lambda_is_at_most_the_second_moment_exponent(name):
    rule = RULES[name]
    modes = reduced_modes(FOUR @ FOUR.T)
    edge = mean_square_lr(modes, batch_size=1, rule=rule)
    for share in (0.5, 1.0, 1.2):
        found = sgd_exponent(modes, share * edge, batch_size=1, rule=rule)
        bound = second_moment_exponent(modes, share * edge, batch_size=1, rule=rule, tol=1e-5)
        assert float(found.value) <= bound + 4 * float(found.error) + 1e-4
    assert float(sgd_exponent(modes, edge, batch_size=1, rule=rule).value) < 0


def test_order_and_duplication_of_samples_do_not_matter():
    y = random(8, 5, seed=8)
    modes = reduced_modes(y @ y.T)
    order = torch.tensor([4, 1, 7, 3, 0, 2, 6, 5])
    permuted, twice = reduced_modes((y @ y.T)[order][:, order]), reduced_modes(torch.cat([y, y]) @ torch.cat([y, y]).T)
    assert twice.rank == modes.rank
    assert torch.allclose(twice.curvatures, modes.curvatures)
    for rule in RULES.values():
        lr = mean_square_lr(modes, batch_size=3, replacement=True, rule=rule)
        for same in (permuted, twice):
            assert mean_square_lr(same, batch_size=3, replacement=True, rule=rule) == pytest.approx(lr, rel=1e-7)
            assert float(gd_exponent(same, lr, rule=rule)) == pytest.approx(float(gd_exponent(modes, lr, rule=rule)))
    lr = mean_square_lr(modes, batch_size=3, replacement=True)
    runs = [sgd_exponent(m, lr, batch_size=3, replacement=True, steps=4000) for m in (modes, permuted, twice)]
    for run in runs[1:]:
        agrees(run, float(runs[0].value), float(runs[0].error))


def test_correction_rescales_the_rate():
    modes, rule = reduced_modes(FOUR @ FOUR.T), UpdateRule(0.9, 0.9)
    early = UpdateRule(0.9, 0.9, correction=0.25)
    assert torch.allclose(gd_exponent(modes, 0.1, rule=early), gd_exponent(modes, 0.4, rule=rule), rtol=1e-12)
    ratio = mean_square_lr(modes, batch_size=1, rule=rule) / mean_square_lr(modes, batch_size=1, rule=early)
    assert ratio == pytest.approx(4, rel=1e-10)
    exponents = [
        float(sgd_exponent(modes, lr, batch_size=1, rule=r, steps=2000).value) for lr, r in ((0.1, early), (0.4, rule))
    ]
    # The norms differ by a constant factor of m, which a long run forgets.
    assert exponents[0] == pytest.approx(exponents[1], abs=2e-3)


def test_large_batches_take_the_other_path_to_the_same_law():
    y = random(12, 6, seed=9)
    modes = reduced_modes(y @ y.T, 2)
    # Three of six samples are counted, two of six gathered; every batch is enumerated for the product of determinants.
    for batch_size in (2, 3, 5):
        lr = 1.2 * mean_square_lr(modes, batch_size=batch_size)
        batches = list(step_matrices(y, 2, batch_size, lr))
        draws = torch.randint(len(batches), (3000,), generator=seeded(1))
        v, logs = random(6, seed=1), []
        for i in draws:
            v = batches[int(i)] @ v
            logs.append(v.norm().log())
            v = v / v.norm()
        logs = torch.stack(logs[100:]).view(29, 100).mean(1)
        agrees(
            sgd_exponent(modes, lr, batch_size=batch_size, steps=3000), float(logs.mean()), float(logs.std() / 29**0.5)
        )


def test_sub_sample_of_a_population():
    modes = regression()
    # With replacement from the six, the noise shrunk: the second moment is that of the population's batches.
    for batch_size in (1, 4, 30):
        shrunk = second_moment(modes, batch_size, population=40)
        f = math.sqrt((40 - batch_size) / 39)
        h, x = torch.diag(modes.curvatures), random(6, 6, seed=1)
        x = x + x.T
        drawn = second_moment(modes, batch_size, replacement=True, population=40)
        expected = h @ x @ h + f**2 * (drawn(x) - h @ x @ h)
        assert torch.allclose(shrunk(x), expected, rtol=1e-10)
        lr = mean_square_lr(modes, batch_size=batch_size, population=40)
        found = sgd_exponent(modes, lr, batch_size=batch_size, population=40)
        assert float(found.value) < 0
        assert float(sgd_exponent(modes, 2 * lr, batch_size=batch_size, population=40).value) > 0
    exact = sgd_exponent(modes, 0.1, batch_size=40, population=40)
    assert exact.value == gd_exponent(modes, 0.1)
    assert exact.error == 0
    # Scalar, f explicit: E log |1 - lr ((1 - f) h + f a_B)|.
    two, f = scalar([1, 3]), math.sqrt(98 / 99)
    values = [math.log(abs(1 - 0.3 * ((1 - f) * 2 + f * a))) for a in (1, 2, 2, 3)]
    agrees(sgd_exponent(two, 0.3, batch_size=2, population=100, steps=4000), sum(values) / 4)


def test_rates_share_their_batches():
    modes = reduced_modes(FOUR @ FOUR.T)
    lrs = f64([0.1, 0.5, 0.9])
    for rule in (UpdateRule(), UpdateRule(0.9), UpdateRule(weight_decay=0.1)):
        together = sgd_exponent(modes, lrs, batch_size=1, rule=rule, generator=seeded(2))
        alone = torch.stack([sgd_exponent(modes, lr, batch_size=1, rule=rule, generator=seeded(2)).value for lr in lrs])
        assert torch.allclose(together.value, alone, atol=1e-9)
    assert gd_exponent(modes, lrs).shape == (3,)


def test_finite_time_exponents_spread_around_lambda():
    modes = reduced_modes(TANH)
    short, long = (finite_time_exponents(modes, f64([0.35]), horizon=n, batch_size=1, samples=256) for n in (50, 2000))
    assert short.shape == (256, 1)
    assert short.std() > 3 * long.std()
    assert float(long.mean()) == pytest.approx(0.0238, abs=4 * float(long.std()) / 16 + 0.002)
    # One step from a random direction with every sample: at most the norm of the step.
    one = finite_time_exponents(modes, 0.35, horizon=1, batch_size=4)
    assert float(one.max()) <= math.log(1.0 + 1e-12)


def test_regularity_counts_components_and_finds_singular_steps():
    gram = torch.block_diag(f64([[4, 1], [1, 2]]), f64([[3.0]]))
    margin, components = regularity(gram, 0.25)
    assert (margin, components) == (0, 2)
    assert regularity(gram, 0.3)[0] == pytest.approx(0.1)
    assert regularity(torch.diag(f64([1, 2, 3, 4])), 0.3, 2)[0] == pytest.approx(0.1)
    chain = 2 * torch.eye(40, dtype=torch.float64) + torch.diag(torch.ones(39), 1) + torch.diag(torch.ones(39), -1)
    order = torch.randperm(40, generator=seeded())
    assert regularity(chain[order][:, order], 0.1)[1] == 1


def test_stability_diagram():
    modes = reduced_modes(FOUR @ FOUR.T)
    diagram = stability_diagram(modes)
    assert diagram.batch_sizes.tolist() == [1, 2, 4]
    assert diagram.lyapunov.shape == diagram.error.shape == (3, 24)
    assert (diagram.mean_square_lr <= diagram.critical_lr * (1 + 1e-9)).all()
    assert diagram.lrs[0] < diagram.mean_square_lr.min()
    assert diagram.lrs[-1] > diagram.critical_lr.max()
    below = diagram.lrs < diagram.critical_lr[:, None] * 0.95
    assert (diagram.lyapunov[below] < 0).all()
    sub = stability_diagram(modes, population=1000, lrs=f64([0.1, 0.2]), batch_sizes=[1, 16])
    assert sub.lyapunov.shape == (2, 2)


def test_what_cannot_be_measured_says_what_to_do():
    modes = scalar([1, 3])
    for call, words in (
        (lambda: reduced_modes(torch.eye(5), 2), "outputs"),
        (lambda: reduced_modes(torch.eye(4)[:3]), "shape"),
        (lambda: reduced_modes(f64([[1, 2], [0, 1]])), "symmetric"),
        (lambda: reduced_modes(f64([[1, math.nan], [0, 1]])), "finite"),
        (lambda: sgd_exponent(modes, 0.1, batch_size=3), "batch_size"),
        (lambda: sgd_exponent(modes, 0.1, batch_size=1, population=1), "population"),
        (lambda: sgd_exponent(modes, 0.1, batch_size=1, population=9, sampling="reshuffle"), "iid"),
        (lambda: mean_square_lr(modes, batch_size=0), "batch_size"),
        (lambda: sum_of_exponents(modes, 0.1, batch_size=1, rule=UpdateRule(0.9)), "plain"),
        (lambda: UpdateRule(0.9, 0.1, nesterov=True), "Nesterov"),
        (lambda: critical_lr(modes, batch_size=1, grid=1.0), "grid"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_critical_rate_lies_at_the_kink_and_not_before_it():
    """Below its zero lambda is flat at -1e-3, then it rises: a line across a 10 % cell would lie too low."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(48, 60, generator=generator, dtype=torch.float64)
    z *= torch.logspace(0, -1.5, 60, dtype=torch.float64)
    modes = reduced_modes(z @ z.T)
    found = critical_lr(modes, batch_size=16, population=4000, steps=3000, grid=1.2)
    fine = torch.tensor([0.985, 1.015], dtype=torch.float64) * found.value
    below, above = sgd_exponent(modes, fine, batch_size=16, population=4000, steps=20000).value
    assert below < 0 < above


@pytest.mark.parametrize("power", [-300, -120, -60, 60, 250])
@pytest.mark.parametrize(
    "rule",
    [UpdateRule(), UpdateRule(momentum=0.9), UpdateRule(momentum=0.9, nesterov=True), UpdateRule(decoupled_decay=0.1)],
    ids=str,
)
def test_critical_rates_scale_with_the_curvature_however_small_or_large(rule, power):
    """Of a saturated network it is 1e-60, whose squares are 0 in any precision, and itself in single."""
    scale = 2.0**power
    scaled = replace(rule, decoupled_decay=rule.decoupled_decay * scale)
    how = {"batch_size": 2, "steps": 60, "chains": 4}
    one, other = (
        critical_lr(reduced_modes(TANH), rule=rule, **how),
        critical_lr(reduced_modes(TANH * scale), rule=scaled, **how),
    )
    assert one.value < math.inf and one.mean_square < math.inf
    for name in ("value", "error", "mean_square"):
        assert getattr(other, name) * scale == pytest.approx(getattr(one, name), rel=1e-9)
    assert gd_critical_lr(reduced_modes(TANH * scale), scaled) * scale == pytest.approx(
        gd_critical_lr(reduced_modes(TANH), rule)
    )
    lrs = one.value * f64([0.5, 1.5])
    tables = [
        stability_diagram(reduced_modes(TANH * s), lrs=lrs / s, batch_sizes=[2], rule=r, chains=4, steps=60)
        for s, r in ((1.0, rule), (scale, scaled))
    ]
    assert torch.allclose(tables[0].lyapunov, tables[1].lyapunov, 1e-6, 1e-9)


@pytest.mark.parametrize("rule", [UpdateRule(), UpdateRule(momentum=0.9), UpdateRule(momentum=0.9, dampening=0.9)])
def test_at_rate_zero_nothing_moves(rule):
    assert abs(second_moment_exponent(reduced_modes(TANH), 0.0, batch_size=2, rule=rule)) < 1e-8
