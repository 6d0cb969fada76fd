"""The largest eigenvalue from few products: closed form, dense matrices, and the cases without a rule."""

import math

import numpy as np
import pytest
import torch
from problems import close, f64, random, symmetric

from lsp_callbacks.linalg import Images, TopNode, from_matrix, lanczos


def images_of(A, start, steps: int) -> Images:
    """Images of a Krylov space, or of less where nothing is new."""
    images = Images(from_matrix(A))
    images.add(start / start.norm())
    for _ in range(steps - 1):
        if (direction := images.next(images.top())) is None:
            break
        images.add(direction)
    return images


def top(A, start, steps: int) -> TopNode:
    return images_of(A, start, steps).top()


def test_one_product_has_the_node_in_closed_form():
    """T = [a], coupling b, corner b^2 / a: the nodes are 0 and a + b^2 / a = |A q|^2 / (q A q)."""
    A, start = symmetric([3.0, 2.0, 1.5, 1.0]), random(4, seed=1)
    q = start / start.norm()
    found = top(A, start, steps=1)
    close(found.least, q @ A @ q, 1e-12)
    close(found.value, (A @ q).square().sum() / (q @ A @ q), 1e-12)
    vector = images_of(A, start, steps=1).vector(found)
    close((vector @ A @ q).abs(), (A @ q).norm(), 1e-10)  # with no other product: a step of the power iteration


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_rule_is_the_one_with_a_node_at_0_that_has_the_moments(k):
    """Its nodes and weights integrate 1, x, ..., x^(2 k) against the spectral measure of the start."""
    spectrum = [4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.8]
    A, start = symmetric(spectrum, seed=3), random(7, seed=k)
    q = start / start.norm()
    run = lanczos(from_matrix(A), start, steps=k + 1, tol=0.0)
    basis = run.basis[: k + 1]
    T = basis @ A @ basis.T
    T[k, k] = T[k, k - 1] ** 2 * torch.linalg.inv(T[:k, :k])[-1, -1]
    nodes, vectors = torch.linalg.eigh(T)
    for power in range(2 * k + 1):
        close((vectors[0].square() * nodes**power).sum(), q @ torch.linalg.matrix_power(A, power) @ q, 1e-9)
    close(nodes[0], 0.0, 1e-10)
    close(top(A, start, steps=k).value, nodes[-1], 1e-9)


def test_the_node_lies_between_ritz_value_and_top_of_a_semidefinite_matrix():
    closer = 0
    for seed in range(50):
        spectrum = np.random.default_rng(seed).pareto(1.5, 40)
        A, start = symmetric(spectrum.tolist(), seed=seed), random(40, seed=seed)
        found = top(A, start, steps=2)
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
        images = images_of(A, start, steps=2)
        gained.append(float((images.vector(images.top()) @ u) ** 2 - (plain @ u) ** 2))
    assert min(gained) > 0


@pytest.mark.parametrize("spectrum", [[-1.0, -2.0, -3.0, -7.0], [0.0, 0.0, 0.0, 0.0], [5.0, -9.0, -3.0, 0.0]], ids=str)
def test_negative_and_vanishing_operators(spectrum):
    """Run to the end it is the eigenvalue; before, nothing is told above a Ritz value that is not positive."""
    A, start = symmetric(spectrum, seed=2), random(4, seed=5)
    close(top(A, start, steps=4).value, max(spectrum), 1e-7)
    early = top(A, start, steps=1)
    assert early.value == early.least or early.least > 0


def test_what_is_not_finite_is_nan_and_an_eigenvector_leaves_no_direction():
    broken = images_of(torch.full((5, 5), math.nan, dtype=f64), random(5), steps=1)
    assert math.isnan(broken.top().value) and broken.vector(broken.top()).isnan().all()
    exact = images_of(torch.diag(torch.tensor([2.0, 1.0], dtype=f64)), torch.tensor([1.0, 0.0]).double(), steps=1)
    assert exact.top().value == 2.0 and exact.next(exact.top()) is None


@pytest.mark.parametrize("overlap", [0.05, 0.3])
def test_no_eigenvector_with_that_overlap_lies_beyond_what_is_hidden(overlap):
    """The worst case: all but the overlap of the start is one other eigenvector and the bulk."""
    for seed in range(20):
        A = torch.diag(torch.tensor([1.5, 1.0, *torch.linspace(0, 0.6, 48).tolist()], dtype=f64))
        rest = random(50, seed=seed).abs()
        rest[0], rest[1] = 0.0, 3.0
        start = rest / rest.norm() * (1 - overlap**2) ** 0.5
        start[0] = overlap
        found = top(A, start, steps=2)
        assert found.value + found.hidden(overlap) + 1e-9 >= 1.5
        assert found.hidden(overlap) <= found.hidden(overlap / 2)


def test_the_products_of_one_metric_tell_of_another():
    """Against the operator itself: the same space by the same vectors, ``R^-1/2`` times the directions."""
    A, rates = (
        symmetric([4.0, 3.0, 2.5, *torch.linspace(0, 1, 17).tolist()], seed=4),
        torch.logspace(-3, 3, 20).double(),
    )
    root = rates.sqrt()
    behind = root[:, None] * A * root
    images = Images(from_matrix(A), (None, rates))
    images.add(random(20, seed=2) / random(20, seed=2).norm())
    for metric in (1, 0, 1):
        images.add(images.next(images.top(metric), metric))
    for metric, matrix in enumerate((A, behind)):
        node, truth = images.top(metric), torch.linalg.eigvalsh(matrix)[-1]
        vector = images.vector(node, metric)
        close(vector.norm(), 1.0, 1e-8)
        assert node.least <= vector @ matrix @ vector + 1e-9 and node.least <= node.value <= truth * (1 + 1e-9)
        assert node.value > 0.95 * truth


def test_a_direction_that_depends_on_the_others_is_left_out():
    A = symmetric([3.0, 2.0, 1.0, 0.5, 0.2], seed=1)
    images, start = Images(from_matrix(A), (None, torch.ones(5, dtype=f64))), random(5, seed=3)
    images.add(start / start.norm())
    alone = images.top(0)
    images.add(
        (start + 1e-4 * random(5, seed=4)) / start.norm()
    )  # whatever a difference has made of it is divided by 1e-4
    close(images.top(0).value, alone.value, 1e-9)


def test_orthogonal_directions_in_single_precision():
    for seed in range(20):
        A = symmetric(((1.0 + torch.arange(60, dtype=f64)) ** -0.3).tolist(), seed=seed).float()
        images = images_of(A, A @ random(60, seed=seed).float(), steps=4)
        basis = torch.stack(images._directions).double()
        assert (basis @ basis.T - torch.eye(4, dtype=f64)).abs().max() < 1e-3
        exact = images_of(A.double(), A.double() @ random(60, seed=seed), steps=4).top().value
        close(images.top().value, exact, 1e-4)
