"""Sensitivities over training steps: closed forms, dense products, and estimates with honest errors."""

import copy
import math
from functools import partial

import pytest
import torch
from problems import JORDAN, JORDAN_NORMS, close, f64, freeze, random, regression, symmetric, take
from torch.func import functional_call, jacrev
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lsp_callbacks.functional import function_growth, push_tangents, random_tangents, training_profile
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators import step_jacobian, step_response
from lsp_callbacks.operators.network.outputs import output_jacobian
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.probe_set import ProbeSet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(steps, noises, vectors, seed=0, size=None, sharp=None):
    """Dense steps and injections, pushed."""
    source = generator(seed)
    state, parameters = steps[0].shape[0], noises[0].shape[1]
    now = random_tangents(state, parameters, vectors=vectors, generator=source, sharp=sharp, dtype=steps[0].dtype)
    for A, B in zip(steps, noises):
        now = push_tangents(now, from_matrix(A), from_matrix(B), source)
    return now


def chain(n=9, parameters=9, T=4, seed=0):
    """Random steps of a state whose first entries are the parameters, and how noise enters them."""
    steps = [0.6 * torch.eye(n, dtype=f64) + 0.3 * random(n, n, seed=10 * seed + t) for t in range(T)]
    noises = [-0.1 * random(n, parameters, seed=100 + 10 * seed + t) for t in range(T)]
    return steps, noises


def dense(steps, noises):
    """``A_T ... A_1`` in the parameters, and the sum of ``||A_T ... A_(s+1) B_s||_F^2 / P`` over s."""
    P = noises[0].shape[1]
    product, driven = torch.eye(len(steps[0]), dtype=f64), torch.zeros((), dtype=f64)
    for A, B in zip(reversed(steps), reversed(noises)):
        driven = driven + (product @ B)[:P].square().sum() / P
        product = product @ A
    return product[:P, :P], driven


# Against dense products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 18], ids=["parameters", "with momentum"])
def test_a_full_frame_is_exact(n):
    steps, noises = chain(n)
    product, _ = dense(steps, noises)
    found = training_profile(run(steps, noises, vectors=9))
    close(found.sigma_theta, torch.linalg.matrix_norm(product, 2), 1e-12)
    close(found.mean_square, product.square().sum() / 9, 1e-12)
    close(found.alpha_theta, torch.linalg.matrix_norm(product, 2).log() / 4, 1e-12)
    close(found.alpha_mean_square, (product.square().sum() / 9).log() / 8, 1e-12)
    assert found.mean_square_error == 0 and found.steps == 4


@pytest.mark.parametrize("n", [9, 18], ids=["parameters", "with momentum"])
def test_estimates_are_unbiased_and_know_their_errors(n):
    steps, noises = chain(n, T=3)
    product, driven = dense(steps, noises)
    runs = [training_profile(run(steps, noises, vectors=4, seed=seed)) for seed in range(400)]
    truth = {"mean_square": product.square().sum() / 9, "sigma_u": driven.sqrt()}
    values = {name: torch.stack([getattr(found, name) for found in runs]) for name in truth}
    values["sigma_u"], truth["sigma_u"] = values["sigma_u"].square(), driven  # the square has no bias
    for name, value in values.items():
        assert abs(value.mean() - truth[name]) < 4 * value.std() / 20, name
    claimed = torch.stack([found.mean_square_error.square() for found in runs]).mean().sqrt()
    assert 0.85 < claimed / values["mean_square"].std() < 1.15
    claimed = torch.stack([(2 * found.sigma_u * found.sigma_u_error).square() for found in runs]).mean().sqrt()
    assert 0.85 < claimed / values["sigma_u"].std() < 1.15
    norm = torch.linalg.matrix_norm(product, 2)
    assert all(found.sigma_theta <= norm * (1 + 1e-12) for found in runs)
    exponents = torch.stack([found.alpha_mean_square for found in runs])
    claimed = torch.stack([found.alpha_mean_square_error for found in runs]).square().mean().sqrt()
    assert 0.8 < claimed / exponents.std() < 1.25


def test_the_sharp_direction_is_in_the_frame():
    A = symmetric([0.9] * 199 + [-1.5], seed=1)
    vectors = torch.linalg.eigh(A).eigenvectors
    steps, noises = [A] * 5, [-0.1 * torch.eye(200, dtype=f64)] * 5
    with_it = training_profile(run(steps, noises, vectors=3, sharp=7 * vectors[:, 0]))
    without = training_profile(run(steps, noises, vectors=3))
    close(with_it.alpha_theta, math.log(1.5), 1e-12)
    assert without.alpha_theta < math.log(1.5) - 0.1
    assert with_it.mean_square == without.mean_square  # of random directions only
    for sharp in (torch.zeros(200, dtype=f64), None):
        close(training_profile(run(steps, noises, vectors=3, sharp=sharp)).sigma_theta, without.sigma_theta, 1e-12)


# Closed forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.5, 1.0, 1.2])
def test_a_constant_contraction(c):
    eta, T, n = 0.1, 6, 400
    eye = torch.eye(n, dtype=f64)
    found = training_profile(run([c * eye] * T, [-eta * eye] * T, vectors=4))
    for exponent in (found.alpha_theta, found.alpha_mean_square):
        close(exponent, math.log(c), 1e-12)
    expected = eta * sum(c ** (2 * k) for k in range(T)) ** 0.5
    assert abs(found.sigma_u - expected) < 4 * found.sigma_u_error and found.sigma_u_error < 0.05 * expected
    close(found.alpha_u, 2 * math.log(expected / (eta * T**0.5)) / (T - 1), 0.04)
    assert (found.alpha_u < -0.1, abs(found.alpha_u) < 0.04, found.alpha_u > 0.1)[[0.5, 1.0, 1.2].index(c)]
    if c < 1:
        assert found.sigma_u < eta / (1 - c)  # what the same gradient error at each step could do at most


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_a_jordan_block_grows_like_t_though_its_exponent_is_zero(n):
    found = training_profile(run([JORDAN] * n, [torch.eye(2, dtype=f64)] * n, vectors=2))
    close(found.sigma_theta, JORDAN_NORMS[n], 1e-9)
    close(found.alpha_theta, math.log(JORDAN_NORMS[n]) / n, 1e-9)
    assert 0 < found.alpha_theta < 0.24 and (n < 1000 or found.alpha_theta < 0.01)


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_no_window_overflows(factor):
    A = torch.full((1, 1), factor)
    found = training_profile(run([A] * 8, [torch.ones(1, 1)] * 8, vectors=2))
    close(found.alpha_theta, math.log(factor), 1e-6)
    assert torch.isfinite(found.alpha_u)


def test_degenerate_steps():
    zero, none = torch.zeros(3, 3, dtype=f64), torch.zeros(3, 3, dtype=f64)
    found = training_profile(run([zero] * 2, [none] * 2, vectors=2))
    assert found.alpha_theta == -math.inf and found.sigma_theta == 0 and found.sigma_u == 0 and found.alpha_u.isnan()
    one = training_profile(run([torch.eye(3, dtype=f64)], [torch.eye(3, dtype=f64)], vectors=2))
    close(one.alpha_theta, 0.0, 1e-12)
    assert one.alpha_u.isnan()  # noise had no step to grow in
    with pytest.raises(ValueError, match="nothing was pushed"):
        training_profile(random_tangents(3, 3, vectors=2, generator=generator()))


def test_growth_in_function_space():
    """Two directions: the outputs feel one that contracts, and not the one that stays."""
    J, A = torch.tensor([[2.0, 0.0]], dtype=f64), torch.diag(torch.tensor([0.5, 1.0], dtype=f64))
    now = run([A] * 3, [torch.eye(2, dtype=f64)] * 3, vectors=2)
    start = random_tangents(2, 2, vectors=2, generator=generator(), dtype=f64)
    before, after = ((t.frame @ J.T).square().sum(1) for t in (start, now))
    exponent, error = function_growth(before, after, now.frame_log, 3)
    close(exponent, math.log(0.5), 1e-12), close(error, 0.0, 1e-12)
    assert training_profile(now).alpha_theta > -1e-12


def test_growth_in_function_space_knows_its_error():
    A, J = random(30, 30, seed=1) / 30**0.5, random(6, 30, seed=2)
    spread, claimed = [], []
    for seed in range(400):
        rows = random(6, 30, seed=seed)
        ends = [(rows @ M.T).square().sum(1) for M in (J, J @ A)]
        exponent, error = function_growth(*ends, 0.0, 1)
        spread.append(exponent), claimed.append(error)
    ratio = torch.stack(claimed).square().mean().sqrt() / torch.stack(spread).std()
    assert 0.75 < ratio < 1.25


# Operators ----------------------------------------------------------------------------------------------------------


class Own(torch.optim.Optimizer):
    """An optimizer without a formula."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad + 0.1 * p.grad.square(), alpha=-group["lr"])


RULES = {
    "sgd": partial(SGD, lr=0.1), "momentum": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": partial(Adam, lr=0.01), "adamw": partial(AdamW, lr=0.01), "rmsprop": partial(RMSprop, lr=0.01),
    "adagrad": partial(Adagrad, lr=0.1), "own": partial(Own, lr=0.1),
}  # fmt: skip


@pytest.mark.parametrize("clipping", [None, Clipping(0.05), Clipping(1e3)], ids=["", "clipped", "not clipped"])
@pytest.mark.parametrize("rule", RULES)
def test_noise_moves_the_parameters_as_a_real_step_does(rule, clipping):
    task = regression()
    optimizer = RULES[rule](task.parameters())
    for _ in range(3):
        take(optimizer, task())
    snapshot = freeze(task, optimizer, clipping=clipping)
    B = step_response(snapshot)
    parameters = list(task.parameters())
    xi = random(B.shape[1], seed=3)

    def after(e):
        twin, own = copy.deepcopy((task, optimizer))
        pieces = xi.split([p.numel() for p in parameters])
        for p, piece, g in zip(twin.parameters(), pieces, snapshot.gradient.values()):
            p.grad = g + e * piece.view_as(p)
        if clipping is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clipping.limit)
        own.step()
        return torch.cat([p.detach().flatten() for p in twin.parameters()])

    close((B @ xi)[: len(xi)], (after(1e-6) - after(-1e-6)) / 2e-6, 1e-6)
    assert B.shape[0] == step_jacobian(snapshot).shape[0]


def test_the_outputs_are_differentiated_in_the_parameters():
    task = regression()
    part = lambda lo, hi: lambda: evaluation(task.net(task.x[lo:hi]), lambda f: f.sum(), samples=hi - lo)  # noqa: E731
    probes = ProbeSet(task, (part(0, 3), part(3, 5), part(5, 6)), 6, 2)
    parameters = {name: p.detach() for name, p in task.net.named_parameters()}
    for samples, seen in ((1, 3), (3, 3), (4, 5), (99, 6)):
        rows = jacrev(lambda p, n=seen: functional_call(task.net, p, (task.x[:n],)).flatten())(parameters)
        dense = torch.cat([r.flatten(1) for r in rows.values()], 1) / seen**0.5
        J = output_jacobian(probes, samples=samples)
        close(J.dense(), dense, 1e-12), close(J.T.dense(), dense.T, 1e-12)


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_exponents_are_finite_where_norms_overflow(factor):
    """1e360 and 1e-360 are no doubles; the noise of the last step is, so the rows may shrink without being lost."""
    A = torch.full((1, 1), factor, dtype=f64)
    found = training_profile(run([A] * 12, [torch.ones(1, 1, dtype=f64)] * 12, vectors=2))
    close(found.alpha_theta, math.log(factor), 1e-12), close(found.alpha_theta_bound, math.log(factor), 1e-12)
    close(found.alpha_mean_square, math.log(factor), 1e-12)
    assert found.sigma_theta == (math.inf if factor > 1 else 0) and found.alpha_u < found.alpha_u_bound < math.inf


def test_noise_is_added_to_what_has_shrunk_beyond_a_double():
    """13 steps leave 1e-360 of the first noise: growth brings it back, and beside later noise it is nothing."""
    shrinks, grows = torch.full((1, 1), 1e-30, dtype=f64), torch.full((1, 1), 1e30, dtype=f64)
    none, some = torch.zeros(1, 1, dtype=f64), torch.ones(1, 1, dtype=f64)
    now, alone = run([shrinks] * 13 + [grows] * 12, [some] + [none] * 24, vectors=2), run([grows], [some], vectors=2)
    close(training_profile(now).sigma_u, training_profile(alone).sigma_u, 1e-9)
    late = push_tangents(
        run([shrinks] * 13, [some] + [none] * 12, vectors=2), from_matrix(grows), from_matrix(some), generator(7)
    )
    assert 0.1 < training_profile(late).sigma_u < 10
