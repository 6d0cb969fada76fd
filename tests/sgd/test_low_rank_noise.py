"""The critical rate by the low rank of the noise, against Lanczos to ten digits, and against a dense matrix."""

import pytest
import torch
from problems import random

from lsp_callbacks.functional import UpdateRule, mean_square_lr, reduced_modes
from lsp_callbacks.functional.sgd import low_rank_noise, mean_square
from lsp_callbacks.functional.sgd.low_rank_noise import top_by_noise

RULES = [UpdateRule(), UpdateRule(0.9), UpdateRule(0.9, weight_decay=0.05), UpdateRule(0.9, 0.9, correction=0.5)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_loose_rate_is_at_most_its_tolerance_below_the_exact_one(rule, batch_size, monkeypatch):
    Z = random(24, 40, seed=3) * torch.linspace(0.2, 2, 24, dtype=torch.float64)[:, None]
    modes = reduced_modes(Z @ Z.T)
    exact = mean_square_lr(modes, batch_size=batch_size, population=1000, rule=rule, tol=1e-10)
    monkeypatch.setattr(mean_square, "_top", None)  # Lanczos is not needed
    for tol in (2e-2, 5e-3):
        loose = mean_square_lr(modes, batch_size=batch_size, population=1000, rule=rule, tol=tol)
        assert exact * (1 - tol) <= loose <= exact * (1 + 1e-9)


def test_the_top_of_a_dense_matrix():
    Y, h = random(6, 4, seed=1), torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    source, fixed = h[:, None] + h, 0.3 * h[:, None] * h
    outer = torch.stack([torch.outer(y, y).flatten() for y in Y])
    root = source.flatten().rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * (torch.diag(fixed.flatten()) + outer.T @ outer) * root)
    x, solution = top_by_noise(Y.numpy(), source.numpy(), fixed.numpy(), 1e-9, steps=1000)
    assert x == pytest.approx(float(values[-1]), rel=1e-8)
    assert abs(float((root * vectors[:, -1]) @ (source * torch.from_numpy(solution)).flatten())) == pytest.approx(
        1, rel=1e-6
    )


def test_many_rows_are_multiplied_anew_and_come_to_the_same(monkeypatch):
    Y, h = random(30, 12, seed=4), torch.linspace(3, 0.1, 12, dtype=torch.float64)
    source, fixed = h[:, None] + h, 0.3 * h[:, None] * h
    few = low_rank_noise.top_by_noise(Y.numpy(), source.numpy(), fixed.numpy(), 1e-8, steps=1000)
    monkeypatch.setattr(low_rank_noise, "SMALL", 1)
    many = low_rank_noise.top_by_noise(Y.numpy(), source.numpy(), fixed.numpy(), 1e-8, steps=1000)
    assert few[0] == pytest.approx(many[0], rel=1e-7)
    assert abs(abs(few[1]) - abs(many[1])).max() <= 1e-3 * abs(many[1]).max()
