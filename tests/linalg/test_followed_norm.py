"""The norm that is followed by two vectors: closed forms, dense singular values, and what may go wrong."""

import pytest
import torch
from problems import close, f64, random

from lsp_callbacks.linalg import followed_norm, from_matrix, operator_norm


def of_singular_values(values: list[float], m: int = 12, seed: int = 0) -> torch.Tensor:
    u, v = (torch.linalg.qr(random(n, n, seed=seed + n))[0] for n in (m, len(values)))
    return u[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=f64)) @ v.mT


@pytest.mark.parametrize("dtype, tol", [(f64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_it_follows_a_matrix_that_moves(dtype, tol):
    """Closed form, dense singular values, and Lanczos from nothing; each call is one pair of products a vector."""
    vectors, drift = None, random(12, 8, seed=7)
    for k in range(12):
        A = of_singular_values([4.0, 2.0, *[1.0] * 6]) + 1e-3 * k * drift
        products = []
        operator = from_matrix(A.to(dtype))
        counted = type(operator)(
            operator.shape,
            lambda x, of=operator, n=products: (n.append(1), of.apply(x))[1],
            operator.adjoint,
            dtype=dtype,
        )
        found = followed_norm(counted, vectors, tol=1e-2)
        vectors = found.vectors
        truth = torch.linalg.matrix_norm(A, 2)
        close(found.value, truth, (1e-4 if k == 0 else 1e-5) * float(truth))
        assert found.value <= truth * (1 + tol)
        close(found.value, operator_norm(operator, steps=8, tol=1e-6).value, 1e-3)
        assert len(products) == 2 or k == 0
        close(vectors.double() @ vectors.double().mT, torch.eye(2), 1e-5)


def test_the_second_that_overtakes_the_first_takes_its_place():
    vectors = None
    u, v = torch.eye(9, dtype=f64), torch.eye(6, dtype=f64)
    for second in (1.0, 2.0, 2.9, 3.1, 4.0, 8.0):
        A = 3.0 * torch.outer(u[0], v[0]) + second * torch.outer(u[1], v[1]) + 0.1 * torch.outer(u[2], v[2])
        found = followed_norm(from_matrix(A), vectors)
        vectors = found.vectors
        close(found.value, max(3.0, second), 0.01 * max(3.0, second))


def test_what_has_turned_too_far_begins_anew():
    first = followed_norm(from_matrix(of_singular_values([4.0, 2.0, 1.0, 0.5], seed=1)))
    other = of_singular_values([5.0, 1.0, 1.0, 0.5], seed=5)
    close(followed_norm(from_matrix(other), first.vectors).value, 5.0, 1e-3)


@pytest.mark.parametrize(
    "A, norm",
    [
        (torch.zeros(3, 4, dtype=f64), 0.0),
        (torch.tensor([[2.0]], dtype=f64), 2.0),
        (torch.outer(random(5), random(4, seed=1)), float(random(5).norm() * random(4, seed=1).norm())),
        (torch.ones(4, 1, dtype=f64), 2.0),
    ],
)
def test_degenerate_matrices(A, norm):
    first = followed_norm(from_matrix(A))
    again = followed_norm(from_matrix(A), first.vectors)
    third = followed_norm(from_matrix(2 * A), again.vectors)
    close([first.value, again.value, third.value], [norm, norm, 2 * norm], 1e-9)
    assert bool(third.vectors.isfinite().all())


def test_from_zero_it_finds_what_appears():
    first = followed_norm(from_matrix(torch.zeros(5, 4, dtype=f64)))
    A = of_singular_values([3.0, 1.0, 0.5, 0.1], m=5)
    close(followed_norm(from_matrix(A), first.vectors).value, 3.0, 1e-3)


def test_not_a_number_is_told():
    good = followed_norm(from_matrix(torch.eye(3, dtype=f64)))
    bad = torch.full((3, 3), torch.nan, dtype=f64)
    assert followed_norm(from_matrix(bad), good.vectors).value.isnan()
    close(
        followed_norm(from_matrix(torch.eye(3, dtype=f64)), torch.full((2, 3), torch.nan, dtype=f64)).value, 1.0, 1e-9
    )


def test_each_call_is_one_step_of_subspace_iteration():
    """Dense: the vectors span what ``A^T A`` makes of those before, and stay orthonormal however much they turn."""
    A = of_singular_values([4.0, 3.9, 3.0, 2.0, 1.0])
    vectors = torch.linalg.qr(random(5, 2, seed=3))[0].mT
    for _ in range(4):
        ahead = torch.linalg.qr(A.mT @ A @ vectors.mT)[0]
        found = followed_norm(from_matrix(A), vectors, tol=10.0)
        close(found.vectors.mT @ found.vectors, ahead @ ahead.mT, 1e-10)
        close(found.vectors @ found.vectors.mT, torch.eye(2), 1e-10)
        close(found.value, torch.linalg.matrix_norm(A @ vectors.mT, 2), 1e-10)
        vectors = found.vectors


def test_a_matrix_that_was_0_meanwhile_is_found_again():
    A = of_singular_values([3.0, 1.0, 0.5, 0.1], m=5)
    first = followed_norm(from_matrix(A))
    gone = followed_norm(from_matrix(0 * A), first.vectors)
    close([gone.value, followed_norm(from_matrix(A), gone.vectors).value], [0.0, 3.0], 1e-3)


def test_what_appears_beside_a_matrix_of_rank_1_is_found():
    u, v = torch.eye(7, dtype=f64), torch.eye(5, dtype=f64)
    A, vectors = 3.0 * torch.outer(u[0], v[0]), None
    for _ in range(3):
        vectors = followed_norm(from_matrix(A), vectors).vectors
    close(followed_norm(from_matrix(A + 8.0 * torch.outer(u[1], v[1])), vectors).value, 8.0, 1e-2)
