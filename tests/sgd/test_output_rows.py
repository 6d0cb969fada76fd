"""One row for each sample's outputs: dense Hessians, saturated outputs, and what it leaves of the curvature."""

import numpy as np
import pytest
import torch
from problems import close, f64, random
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import ProbeSet
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.sgd.output_rows import OutputMetric, last_layer, softmax_rows
from lsp_callbacks.step.criterion import evaluation


def dense(p, weights, squares=None):
    """``w (diag(p) - p p^T) + q p p^T``."""
    S = weights[..., None, None] * (torch.diag_embed(p) - p[..., None] * p[..., None, :])
    return S if squares is None else S + squares[..., None, None] * p[..., None] * p[..., None, :]


def rows(p, weights, head=None, squares=None):
    squares = None if squares is None else squares.numpy()
    metric = OutputMetric(head, p.shape[-1])
    return torch.from_numpy(softmax_rows(p.numpy(), weights.numpy(), metric, squares)).double()


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_below_the_hessian_and_near_its_top_where_that_stands_apart(classes, dtype, with_head):
    p = (6 * random(40, 3, classes, seed=5)).softmax(-1)
    weights = random(40, 3, seed=6).abs()
    head = random(classes, 7, seed=7).to(dtype) if with_head else None
    z = rows(p.to(dtype), weights.to(dtype), head)
    S = dense(p, weights)
    values, vectors = torch.linalg.eigh(S)
    # S - z z^T stays positive where z^T S^-1 z is at most 1, on the range of S.
    kept = values > 1e-9 * values[..., -1:]
    along = (z[..., None, :] @ vectors)[..., 0, :].square() / torch.where(kept, values, torch.inf)
    assert float(along.sum(-1).max()) < 1 + 1e-3
    apart = values[..., -2] < 0.1 * values[..., -1]
    assert int(apart.sum()) > 3
    close(z.square().sum(-1)[apart], values[..., -1][apart], 5e-2)


def test_a_saturated_output_keeps_its_digits():
    """``p = (1 - 2 e, e, e)``: 3 e along (-2, 1, 1) / 6^(1/2), and where nothing is left, 0."""
    e = 1e-12
    p = torch.tensor([[[1.0, e, e]], [[1.0, 0.0, 0.0]]])
    z = rows(p, torch.ones(2, 1))
    direction = torch.tensor([-2, 1, 1], dtype=f64) / 6**0.5
    assert float(z[0].square().sum()) == pytest.approx(3 * e, rel=1e-4)
    assert float((z[0, 0] @ direction).abs()) == pytest.approx((3 * e) ** 0.5, rel=1e-4)
    assert not bool(z[1].any())


@pytest.mark.parametrize("classes", [10, 40, 300])
def test_samples_that_know_nothing_look_at_the_main_direction_of_the_last_layer(classes):
    """S is (I - 1 1^T / C) / C for all: of its eigenvectors, all alike, the one that W moves most."""
    p = (1e-4 * random(30, 1, classes, seed=2)).softmax(-1).float()
    head = random(classes, 5, seed=3).float() * torch.tensor([9.0, 1, 1, 1, 1])
    z = rows(p, torch.ones(30, 1), head)[:, 0]
    close(z.square().sum(-1), torch.full((30,), 1 / classes), 1e-2 / classes)
    main = head[:, 0].double() - head[:, 0].double().mean()
    assert float((F.normalize(z, dim=-1) @ F.normalize(main, dim=0)).abs().min()) > 0.95


def test_a_z_loss_adds_its_part():
    p = (2 * random(20, 2, 6, seed=8)).softmax(-1)
    weights, squares = random(20, 2, seed=9).abs(), 50 * random(20, 2, seed=10).abs() + 5
    values, vectors = torch.linalg.eigh(dense(p, weights, squares))
    z = rows(p, weights, squares=squares)
    apart = values[..., -2] < 0.3 * values[..., -1]
    assert int(apart.sum()) > 10
    close((z * vectors[..., -1]).sum(-1).square()[apart], values[..., -1][apart], 1e-3)


def test_a_negative_weight_is_no_curvature():
    half = torch.tensor([[[0.5, 0.5]]])
    with pytest.raises(Unmeasurable, match="not convex"):
        rows(half, torch.tensor([[-1.0]]))
    assert not bool(rows(half, torch.tensor([[0.0]])).any())


def test_the_last_layer_is_the_last_matrix_with_a_row_for_each_output():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    assert last_layer(dict(net.named_parameters()), 5) is net[2].weight
    assert last_layer(dict(net.named_parameters()), 7) is None
    unusable = OutputMetric(torch.zeros(5, 3), 5)
    assert np.array_equal(unusable(np.ones(5)), np.ones(5))


LOSSES = {
    "cross-entropy": lambda f, y: F.cross_entropy(f, y),
    "labels": lambda f, y: F.binary_cross_entropy_with_logits(
        f, (y[:, None] % torch.arange(2, f.shape[1] + 2) < 1) * 1.0
    ),
}


@pytest.mark.parametrize(
    ("loss", "classes", "least"), [("cross-entropy", 10, 0.7), ("cross-entropy", 100, 0.4), ("labels", 50, 0.5)]
)
@pytest.mark.parametrize("nonlinear", [nn.ReLU, nn.Tanh])
def test_one_row_keeps_most_of_the_sharpness_of_all_outputs_at_the_start(loss, classes, least, nonlinear):
    """Before a network knows anything all directions of its outputs count, and a top eigenvector is any of them."""
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, 32), nonlinear(), nn.Linear(32, 32), nonlinear(), nn.Linear(32, classes))
        x, y = torch.randn(12, 20), torch.randint(classes, (12,))
        part = lambda: evaluation(net(x), lambda f: LOSSES[loss](f, y), samples=12)  # noqa: B023, E731
        probes = ProbeSet(net, (part,), 12, 12)
        top, every = (
            float(torch.linalg.eigvalsh(tangent_kernel(probes, outputs=which).gram)[-1]) for which in ("top", "all")
        )
        assert least < top / every < 1 + 1e-5
