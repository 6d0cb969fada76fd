"""The largest eigenvalue from few products: closed form, dense matrices, and the cases without a rule."""

import math

import numpy as np
import pytest
import torch
from problems import close, f64, random, symmetric

from lsp_callbacks.linalg import from_matrix, lanczos, top_node


def test_one_product_has_the_node_in_closed_form():
    """T = [a], coupling b, corner b^2 / a: the nodes are 0 and a + b^2 / a = |A q|^2 / (q A q)."""
    A, start = symmetric([3.0, 2.0, 1.5, 1.0]), random(4, seed=1)
    q = start / start.norm()
    found = top_node(from_matrix(A), start, steps=1)
    close(found.least, q @ A @ q, 1e-12)
    close(found.value, (A @ q).square().sum() / (q @ A @ q), 1e-12)
    close((found.vector @ A @ q).abs(), (A @ q).norm(), 1e-10)  # with no other product: a step of the power iteration


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_rule_is_the_one_with_a_node_at_0_that_has_the_moments(k):
    """Its nodes and weights integrate 1, x, ..., x^(2 k) against the spectral measure of the start."""
    spectrum = [4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.8]
    A, start = symmetric(spectrum, seed=3), random(7, seed=k)
    found = top_node(from_matrix(A), start, steps=k)
    T = found.recurrence.clone()
    T[k, k] = T[k, k - 1] ** 2 * torch.linalg.inv(T[:k, :k])[-1, -1]
    nodes, vectors = torch.linalg.eigh(T)
    q = start / start.norm()
    for power in range(2 * k + 1):
        close((vectors[0].square() * nodes**power).sum(), q @ torch.linalg.matrix_power(A, power) @ q, 1e-9)
    close(nodes[0], 0.0, 1e-10)
    close(found.value, nodes[-1], 1e-10)


def test_the_node_lies_between_ritz_value_and_top_of_a_semidefinite_matrix():
    closer = 0
    for seed in range(50):
        spectrum = np.random.default_rng(seed).pareto(1.5, 40)
        A, start = symmetric(spectrum.tolist(), seed=seed), random(40, seed=seed)
        found = top_node(from_matrix(A), start, steps=2)
        ritz = lanczos(from_matrix(A), start, steps=2, tol=0.0)
        close(found.least, ritz.values[-1], 1e-9)
        assert found.least <= found.value <= spectrum.max() * (1 + 1e-9)
        closer += float(spectrum.max() - found.value) < 0.7 * float(spectrum.max() - found.least)
    assert closer >= 25


def test_its_vector_has_gained_a_direction_without_a_product():
    spectrum = [1.0, *torch.linspace(-0.1, 0.5, 99).tolist()]
    gained = []
    for seed in range(20):
        A = symmetric(spectrum, seed=seed)
        u, start = torch.linalg.eigh(A).eigenvectors[:, -1], A @ random(100, seed=seed)
        plain = lanczos(from_matrix(A), start, steps=2, tol=0.0).pair(-1).vector
        gained.append(float((top_node(from_matrix(A), start, steps=2).vector @ u) ** 2 - (plain @ u) ** 2))
    assert min(gained) > 0


@pytest.mark.parametrize("spectrum", [[-1.0, -2.0, -3.0, -7.0], [0.0, 0.0, 0.0, 0.0], [5.0, -9.0, -3.0, 0.0]], ids=str)
def test_negative_and_vanishing_operators(spectrum):
    """Run to the end it is the eigenvalue; before, nothing is told above a Ritz value that is not positive."""
    A, start = symmetric(spectrum, seed=2), random(4, seed=5)
    close(top_node(from_matrix(A), start, steps=4).value, max(spectrum), 1e-10)
    early = top_node(from_matrix(A), start, steps=1)
    assert early.value == early.least or early.least > 0


def test_what_is_not_finite_is_nan_and_an_eigenvector_is_complete():
    broken = top_node(from_matrix(torch.full((5, 5), math.nan, dtype=f64)), random(5), steps=2)
    assert broken.value.isnan() and broken.vector.isnan().all()
    exact = top_node(
        from_matrix(torch.diag(torch.tensor([2.0, 1.0], dtype=f64))), torch.tensor([1.0, 0.0]).double(), steps=1
    )
    assert exact.complete and exact.value == 2.0 and exact.hidden(0.05) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        top_node(from_matrix(torch.eye(3)), torch.ones(3), steps=0)


@pytest.mark.parametrize("overlap", [0.05, 0.3])
def test_no_eigenvector_with_that_overlap_lies_beyond_what_is_hidden(overlap):
    """The worst case: all but the overlap of the start is one other eigenvector and the bulk."""
    for seed in range(20):
        A = torch.diag(torch.tensor([1.5, 1.0, *torch.linspace(0, 0.6, 48).tolist()], dtype=f64))
        rest = random(50, seed=seed).abs()
        rest[0], rest[1] = 0.0, 3.0
        start = rest / rest.norm() * (1 - overlap**2) ** 0.5
        start[0] = overlap
        found = top_node(from_matrix(A), start, steps=2)
        assert found.value + found.hidden(overlap) + 1e-9 >= 1.5
        assert found.hidden(overlap) <= found.hidden(overlap / 2)


def test_more_products_are_taken_while_they_are_asked_for():
    A, start = from_matrix(symmetric(torch.linspace(0, 1, 30).tolist())), random(30)
    assert top_node(A, start, steps=2).products == 2
    assert top_node(A, start, steps=2, most=5, enough=lambda node: node.products == 4).products == 4
    assert top_node(A, start, steps=2, most=5, enough=lambda node: False).products == 5


def test_few_parameters_are_measured_to_the_end_in_single_precision():
    """Vectors that lose a digit at each step are not orthogonal after twelve: the value was wrong and called exact."""
    for seed in range(40):
        spectrum = (1.0 + torch.arange(12, dtype=f64)) ** -0.3
        A = symmetric(spectrum.tolist(), seed=seed).float()
        start = A @ random(12, seed=seed).float()
        found = top_node(from_matrix(A), start, steps=12)
        basis = torch.stack(found.basis).double()
        assert found.complete and (basis @ basis.T - torch.eye(12, dtype=f64)).abs().max() < 1e-2
        close(found.value, torch.linalg.eigvalsh(A.double())[-1], 1e-5)
