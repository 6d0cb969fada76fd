"""A window of past steps as one operator, and the ends of what is known from random directions alone."""

import copy
import math
from functools import partial

import pytest
import torch
from problems import Regression, close, f64, random, tanh_mlp, trajectory
from torch.optim import SGD, Adam

from lsp_callbacks.functional import SoftThreshold
from lsp_callbacks.functional.trajectory.norm_intervals import gaussian_form_interval, norm_by_random_rows
from lsp_callbacks.linalg import from_matrix, top_between
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.window import Window, keep, placed, squares
from lsp_callbacks.step.clipping import Clipping

RULES = {
    "sgd": (partial(SGD, lr=0.3), {}),
    "momentum, clipped": (partial(SGD, lr=0.3, momentum=0.9), {"clipping": Clipping(0.05)}),
    "adam, prox": (partial(Adam, lr=0.05), {"prox": SoftThreshold(0.1)}),
}


@pytest.mark.parametrize("rule", RULES)
def test_products_with_the_window_are_those_of_its_steps(rule):
    """Forward, backward and with noise, from where the parameters are when it is over; scaled by any logs."""
    make, settings = RULES[rule]
    task = Regression(tanh_mlp(2, 2, 1), random(6, 2, seed=1), random(6, 1, seed=2))
    optimizer = make(task.parameters())
    P = sum(p.numel() for p in task.parameters())
    product, reach, kept = None, [], []
    for snapshot in trajectory(task, optimizer, 3, **settings):
        A, B = update_jacobian(snapshot, method="exact").dense(), update_response(snapshot).dense()
        product = A if product is None else A @ product
        reach = [*(A @ noise for noise in reach), B]
        kept.append(keep(snapshot, "exact"))
    logs, noise_log = [0.7, -0.4, 0.2], 0.3
    M = product[:P, :P] * math.exp(-sum(logs))
    L = torch.cat([noise[:P] for noise in reach], 1) * math.exp(-noise_log)
    window = Window(kept, logs, noise_log)
    before = copy.deepcopy(task.state_dict())
    for rows in (1, 3):
        v = random(rows, P, seed=rows)
        close(window.forward(v), v @ M.T, 1e-10)
        close(window.backward(v)[0], v @ M, 1e-10)
    xi = random(3, P, seed=5)
    close(window.forward(torch.zeros(1, P, dtype=f64), list(xi))[0], L @ xi.flatten(), 1e-10)
    close(torch.cat(window.backward(v, driven=True)[1]), v[-1] @ L, 1e-10)
    J = random(2 * P, P, seed=9)  # longer than the parameters
    dense = squares(window, [from_matrix(J)]).dense()
    assert dense.shape == (3, 2 * P, 2 * P)
    for found, factor in zip(dense, (M, J @ M, L)):
        size = len(factor)
        close(found[:size, :size], factor @ factor.T, 1e-9)
        assert not found[size:].any() and not found[:, size:].any()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), task.state_dict().values()))


@pytest.mark.parametrize("rule", RULES)
def test_differences_of_a_step_serve_all_passes_where_they_keep_little(rule):
    make, settings = RULES[rule]
    task = Regression(tanh_mlp(2, 2, 1), random(6, 2, seed=1), random(6, 1, seed=2))
    optimizer, kept, product = make(task.parameters()), [], None
    P = sum(p.numel() for p in task.parameters())
    for snapshot in trajectory(task, optimizer, 3, **settings):
        A = update_jacobian(snapshot, method="exact").dense()
        product = A if product is None else A @ product
        kept.append(keep(snapshot, "finite_difference"))
        exact = keep(snapshot, "exact")
    window, v = Window(kept, [0.0] * 3), random(1, P, seed=3)
    for _ in range(3):
        close(window.forward(v), v @ product[:P, :P].T, 1e-5)
        close(window.backward(v)[0], v @ product[:P, :P], 1e-5)
    assert all((step.maps()[0] is step.maps()[0]) == ("adam" not in rule) for step in kept)
    with placed(window.parameters) as place:
        place(exact.theta)
        assert exact.maps()[0] is not exact.maps()[0]  # each keeps the graph of a replay


@pytest.mark.parametrize("n, rank", [(400, 400), (400, 3), (5, 5)])
def test_the_largest_eigenvalue_lies_between_its_ends(n, rank):
    """Also in a batch whose parts converge at their own pace; products end where the ends are near."""
    missed = 0
    for seed in range(20):
        factors = torch.stack(
            [random(n, rank, seed=seed), random(n, rank, seed=seed + 99) * torch.linspace(0, 3, rank)]
        )
        true = torch.linalg.matrix_norm(factors, 2).square()
        source = torch.Generator().manual_seed(seed)
        ritz, upper = top_between(
            from_matrix(factors @ factors.mT), steps=30, ratio=1.3, failure=0.05, generator=source
        )
        assert bool((ritz.values[..., -1] <= true * (1 + 1e-9)).all())
        assert bool((upper <= 1.3 * ritz.values[..., -1] * (1 + 1e-9)).all()) and len(ritz.basis) < 30
        missed += int((upper < true * (1 - 1e-9)).sum())
    assert missed <= 2 + 3 * 2**0.5  # of 40, each with probability 0.05 at most


@pytest.mark.parametrize("size, rows", [(3, 2), (10, 4), (300, 4), (40, 39), (4, 4)])
def test_random_rows_bound_the_norm(size, rows):
    """At the worst matrix, of rank 1, with a probability that can be seen to fail."""
    failure, missed, runs = 0.1, 0, 400
    source = torch.Generator().manual_seed(0)
    for _ in range(runs):
        q = torch.linalg.qr(torch.randn(size, rows, generator=source, dtype=f64)).Q
        missed += norm_by_random_rows(float(q[0].norm()), rows, size, failure=failure) < 1 - 1e-12
    assert missed <= runs * failure + 3 * (runs * failure * (1 - failure)) ** 0.5
    assert missed > 0 or rows >= size - 1  # no more than it has to be


SPECTRA = {"one": [1.0], "flat": [1.0] * 30, "one of many": [30.0] + [1.0] * 60, "falling": [2.0**-k for k in range(9)]}


@pytest.mark.parametrize("told", [True, False], ids=["largest", "nothing"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_ends_of_a_gaussian_form_hold(spectrum, told):
    values = torch.tensor(SPECTRA[spectrum], dtype=f64)
    failure, runs = 0.2, 400
    source, missed = torch.Generator().manual_seed(0), torch.zeros(2)
    for _ in range(runs):
        seen = torch.randn(4, len(values), generator=source, dtype=f64).square() @ values
        low, high = gaussian_form_interval(seen, largest=float(values.max()) if told else math.inf, failure=failure)
        missed += torch.tensor([low > values.sum(), high < values.sum()])
    assert bool((missed <= runs * failure / 2).all())
    assert not told or spectrum == "one of many" or bool((missed > 0).any())


def test_ends_where_nothing_moves():
    assert gaussian_form_interval(torch.zeros(4)) == (0.0, 0.0)
    assert all(map(math.isnan, gaussian_form_interval(torch.tensor([math.nan, 1.0]))))
    assert norm_by_random_rows(0.0, 2, 100) == 0.0
