"""The top eigenpair of a softmax's covariance: dense eigenpairs, saturated outputs, and eigenvalues that are equal."""

import pytest
import torch
from problems import close, f64, random

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.sgd.softmax_pairs import softmax_pairs


def dense(p, weights):
    """Values and vectors, ascending, of ``w (diag(p) - p p^T)``."""
    S = weights[..., None, None] * (torch.diag_embed(p) - p[..., None] * p[..., None, :])
    return torch.linalg.eigh(S)


@pytest.mark.parametrize("classes", [2, 10, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_are_those_of_the_dense_matrix(classes, dtype):
    p = (6 * random(40, 3, classes, seed=5)).softmax(-1)
    weights = random(40, 3, seed=6).abs()
    found = softmax_pairs(p.to(dtype), weights.to(dtype)).double()
    values, vectors = dense(p, weights)
    size = found.square().sum(-1)
    assert bool((size <= values[..., -1] * (1 + 1e-5)).all())  # a quotient is at most the eigenvalue
    apart = values[..., -2] < 0.6 * values[..., -1]
    assert float(apart.double().mean()) > 0.3
    along = (found * vectors[..., -1]).sum(-1).abs()
    close(along[apart], values[..., -1][apart].sqrt(), 1e-3)
    assert float((size / values[..., -1]).min()) > 0.9


def test_a_saturated_output_keeps_its_digits():
    """``p = (1 - 2 e, e, e)``: 3 e along (-2, 1, 1) / 6^(1/2), and where nothing is left, 0."""
    e = 1e-12
    p = torch.tensor([[[1.0, e, e]], [[1.0, 0.0, 0.0]]])
    found = softmax_pairs(p, torch.ones(2, 1))
    direction = torch.tensor([-2, 1, 1], dtype=f64) / 6**0.5
    assert float(found[0].square().sum()) == pytest.approx(3 * e, rel=1e-4)
    assert float((found[0, 0].double() @ direction).abs()) == pytest.approx((3 * e) ** 0.5, rel=1e-4)
    assert not bool(found[1].any())


@pytest.mark.parametrize("classes", [10, 40])
def test_samples_that_know_nothing_have_one_direction(classes):
    """Every direction is an eigenvector, with eigenvalue 1 / C: small differences must not turn samples apart."""
    p = (1e-3 * random(30, 1, classes, seed=2)).softmax(-1)
    found = softmax_pairs(p, torch.ones(30, 1))[:, 0]
    close(found.square().sum(-1), torch.full((30,), 1 / classes), 1e-2 / classes)
    alike = torch.nn.functional.normalize(found, dim=-1)
    assert float((alike @ alike.T).min()) > 0.99


def test_a_negative_weight_is_no_curvature():
    with pytest.raises(Unmeasurable, match="not convex"):
        softmax_pairs(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[-1.0]]))
    assert not bool(softmax_pairs(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[0.0]])).any())
