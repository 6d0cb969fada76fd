"""The critical rate straight from a Gram matrix: dense brute force, ten digits from modes, no rate at all."""

import math

import pytest
import torch
from frozen_sgd_cases import FOUR, RULES, f64, random, step_matrices

from lsp_callbacks.functional import UpdateRule, gd_critical_lr, gram_mean_square_lr, mean_square_lr, reduced_modes
from lsp_callbacks.functional.sgd import gram_rate

TOL = 5e-3
FAR = {
    "adamw, decay 0": UpdateRule(0.9, 0.9, correction=0.3),
    "adamw, slight decay": UpdateRule(0.9, 0.9, decoupled_decay=1e-4, correction=0.3),
    "nesterov, decay": UpdateRule(0.8, nesterov=True, weight_decay=0.2),
    "direct": UpdateRule(0.9, dampening=0.9, direct=0.12),
    "direct, early": UpdateRule(0.9, dampening=0.9, direct=1.2, correction=2.1),
}


def dense_radius(gram, batch_size, lr, rule):
    """The spectral radius of ``E[A (x) A]`` over every batch."""
    values, vectors = torch.linalg.eigh(gram)
    y = vectors[:, values > 1e-12] * values[values > 1e-12].sqrt()
    a = torch.stack(list(step_matrices(y, 1, batch_size, lr, rule)))
    t = torch.einsum("bij,bkl->ikjl", a, a) / len(a)
    return float(torch.linalg.eigvals(t.reshape(a.shape[1] ** 2, -1)).abs().max())


@pytest.fixture
def alone(monkeypatch):
    """No way out into float64."""
    monkeypatch.setattr(gram_rate, "reduced_modes", None)


@pytest.mark.parametrize("name", RULES | FAR)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_it_is_the_dense_edge_and_never_above_it(name, batch_size, alone):
    rule, gram = (RULES | FAR)[name], FOUR @ FOUR.T
    lr = gram_mean_square_lr(gram, batch_size=batch_size, rule=rule, tol=TOL)
    assert dense_radius(gram, batch_size, lr, rule) < 1 < dense_radius(gram, batch_size, lr / (1 - 1.02 * TOL), rule)


@pytest.mark.parametrize("name", RULES | FAR)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_it_is_that_of_the_modes_for_many_samples_of_which_some_have_rows(name, scale, alone):
    rule = gram_rate.in_unit((RULES | FAR)[name], 1 / scale)
    z = random(24, 40, seed=3) * torch.logspace(0, -2, 24, dtype=torch.float64)[:, None]
    chance = torch.linspace(0.2, 1, 24, dtype=torch.float64)
    gram = scale * (z @ z.T) / (chance[:, None] * chance).sqrt()
    how = {"batch_size": 8, "rule": rule, "population": 1000}
    exact = mean_square_lr(reduced_modes(gram, samples=60, chance=chance), tol=1e-10, **how)
    found = gram_mean_square_lr(gram, samples=60, chance=chance, tol=TOL, **how)
    assert (1 - 1.02 * TOL) * exact <= found <= exact


@pytest.mark.parametrize("size", [1.03, 1.1, 1.5, 3.0, 20.0])
@pytest.mark.parametrize("alike", [20, 100])
def test_many_samples_that_are_alike_do_not_hide_a_sharper_one(alike, size):
    """Two groups that share no mode: the first one is the top of nearly everything but the rate."""
    z = torch.zeros(alike + 1, 2, dtype=torch.float64)
    z[:alike, 0], z[alike, 1] = 1.0, size**0.5
    exact = mean_square_lr(reduced_modes(z @ z.T), batch_size=1, population=10**6, tol=1e-10)
    assert exact == pytest.approx(2 / size, rel=1e-4)
    found = gram_mean_square_lr(z @ z.T, batch_size=1, population=10**6, tol=TOL)
    assert (1 - 1.02 * TOL) * exact <= found <= exact


def test_a_full_batch_has_the_edge_of_gradient_descent():
    gram = FOUR @ FOUR.T
    for name in ("plain", "momentum 0.9", "weight decay"):
        edge = gd_critical_lr(reduced_modes(gram), RULES[name])
        assert (1 - TOL) * edge <= gram_mean_square_lr(gram, batch_size=4, rule=RULES[name], tol=TOL) <= edge
    with pytest.raises(ValueError, match="batch_size=5"):
        gram_mean_square_lr(gram, batch_size=5)


def test_without_a_finite_matrix_there_is_no_rate_and_without_curvature_no_edge():
    for bad in (math.nan, math.inf):
        gram = FOUR @ FOUR.T
        gram[1, 2] = bad
        assert math.isnan(gram_mean_square_lr(gram, batch_size=1))
    assert gram_mean_square_lr(torch.zeros(3, 3), batch_size=1) == math.inf
    assert gram_mean_square_lr(FOUR @ FOUR.T, batch_size=1, rule=UpdateRule(0.9, dampening=1.0)) == math.inf


def test_one_sample_is_its_own_mode(alone):
    """A stream of batches of one: ``E (1 - lr h)^2 = 1`` at ``lr = 2 / h``."""
    gram = f64([[4.0]])
    for rule in (UpdateRule(), UpdateRule(decoupled_decay=1e-4), UpdateRule(0.9, 0.9, decoupled_decay=1e-5)):
        lr = gram_mean_square_lr(gram, batch_size=1, rule=rule, population=10**9, tol=TOL)
        exact = mean_square_lr(reduced_modes(gram), batch_size=1, rule=rule, population=10**9, tol=1e-12)
        assert (1 - TOL) * exact <= lr <= exact and (rule.decoupled_decay or exact == pytest.approx(0.5))
