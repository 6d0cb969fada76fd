"""The norm of a small matrix, from its Gram matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_callbacks.linalg import followed_norm, from_matrix
from lsp_callbacks.linalg.small_norm import FEW, is_small, small_norm


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]))
def test_it_is_the_largest_singular_value_at_any_scale(m, n, seed, scale):
    matrix = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    found = small_norm(scale * matrix)
    assert float(found.value) == pytest.approx(scale * exact, rel=1e-12) and float(found.residual) == 0


def test_it_agrees_with_products_in_single_precision():
    matrix = torch.randn(FEW, 300, generator=torch.Generator().manual_seed(0))
    followed = followed_norm(from_matrix(matrix), steps=200, tol=1e-8)
    assert float(small_norm(matrix).value) == pytest.approx(float(followed.value), rel=1e-5)


def test_zero_and_what_is_not_finite():
    assert float(small_norm(torch.zeros(3, 4)).value) == 0
    for bad in (math.nan, math.inf):
        matrix = torch.ones(3, 4)
        matrix[1, 2] = bad
        assert math.isnan(float(small_norm(matrix).value))


def test_only_a_matrix_that_is_at_hand_is_small():
    small = from_matrix(torch.ones(FEW, 500))
    assert is_small(small.matrix) and is_small(small.T.matrix)
    assert not is_small(from_matrix(torch.ones(FEW + 1, 500)).matrix)
    for other in (small @ small.T, small + small, 2.0 * small, from_matrix(torch.ones(2, 3, 3))):
        assert not is_small(other.matrix)
    assert torch.equal(small.T.matrix, torch.ones(500, FEW))
