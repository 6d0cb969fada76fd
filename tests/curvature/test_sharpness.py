"""Edge and sharp mode of every optimizer, on both sides of the edge."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from optimizer_zoo import Lion
from problems import (
    Quadratic,
    Regression,
    Written,
    close,
    dense_hessian,
    f64,
    freeze,
    random,
    regression,
    symmetric,
    take,
)

from lsp_callbacks import Lyapunov, Monitor, Sharpness, Unmeasurable
from lsp_callbacks.functional import sharp_mode_exponent
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators import coming_rule, decayed_hessian, frozen_rule, preconditioned_hessian, step_jacobian
from lsp_callbacks.operators.cost import followed_cost
from lsp_callbacks.operators.curvature.followed_top import COLD, MOST, USUAL, WARM
from lsp_callbacks.operators.curvature.stability_threshold import followed_mode, stability_threshold
from lsp_callbacks.step.clipping import Clipping

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad

#: Stationary preconditioners: eps stands far above what the gradient, 1e-10, can do to it.
KINDS = {
    "adam": partial(Adam, eps=0.1, betas=(0.9, 0.99)),
    "adam_beta_0.5": partial(Adam, eps=0.1, betas=(0.5, 0.99)),
    "adam_no_momentum": partial(Adam, eps=0.1, betas=(0.0, 0.99)),
    "adam_coupled": partial(Adam, eps=0.1, weight_decay=0.5),
    "amsgrad": partial(Adam, eps=0.1, amsgrad=True),
    "rmsprop": partial(RMSprop, eps=0.1),
    "rmsprop_momentum": partial(RMSprop, eps=0.1, momentum=0.9),
    "rmsprop_centered": partial(RMSprop, eps=0.1, momentum=0.5, centered=True, weight_decay=0.5),
    "nadam": partial(torch.optim.NAdam, eps=0.1, betas=(0.9, 0.99)),
    "nadam_late": partial(torch.optim.NAdam, eps=0.1, betas=(0.9, 0.99), momentum_decay=0.4),
    "adamax": partial(torch.optim.Adamax, eps=0.1, betas=(0.9, 0.99), weight_decay=0.5),
    "radam": partial(torch.optim.RAdam, eps=0.1, betas=(0.9, 0.99)),
    "adagrad": partial(Adagrad, eps=0.1, initial_accumulator_value=0.04),
    "sgd_decay": partial(SGD, momentum=0.9, weight_decay=0.5),
}
DECAYED = {
    "adamw": partial(AdamW, eps=0.1),
    "adamw_beta_0.5": partial(AdamW, eps=0.1, betas=(0.5, 0.99)),
    "adamw_no_momentum": partial(AdamW, eps=0.1, betas=(0.0, 0.99)),
}


def near_the_minimum(groups=((1.0, 2), (0.1, 3))):
    """A quadratic whose gradients are 1e-10: second moments are constant there."""
    problem = Quadratic(symmetric([0.2, 0.5, 1.0, 2.0, 7.0]), sizes=tuple(n for _, n in groups))
    with torch.no_grad():
        for p in problem.parts:
            p.mul_(1e-10)
    return problem


def optimizer_at(kind, problem, scale, ratio=0.1, **settings):
    """Past 30 steps at rate 0, which fill the state and move nothing."""
    optimizer = kind([{"params": [p], "lr": 0.0} for p in problem.parts], **settings)
    for _ in range(30):
        take(optimizer, problem())
    for state in optimizer.state.values():  # long ago: bias corrections no longer change
        if "step" in state:
            state["step"].fill_(10_000)
    for group, relative in zip(optimizer.param_groups, (1.0, ratio)):
        group["lr"] = scale * relative
    return optimizer


@pytest.mark.parametrize("clipping", [None, Clipping(3e-11)], ids=["free", "clipped"])
@pytest.mark.parametrize("name", KINDS)
def test_the_sign_is_right_on_both_sides_of_the_edge(name, clipping):
    """A sweep of rates: the exponent's sign is that of courant - 1, for every window, and its value is log rho."""
    problem = near_the_minimum()
    optimizer = optimizer_at(KINDS[name], problem, 1.0)
    exact = {"steps": 5, "tol": 1e-12, "method": "exact"}
    # Held fixed, the factor of a clipped gradient scales the rates; its own derivative only lowers the growth.
    one = stability_threshold(freeze(problem, optimizer, clipping=clipping), **exact).courant
    for courant in (0.01, 0.3, 0.6, 0.9, 0.98, 1.02, 1.1, 1.6, 3.0):
        for group, relative in zip(optimizer.param_groups, (1.0, 0.1)):
            group["lr"] = float(courant / one) * relative
        snapshot = freeze(problem, optimizer, clipping=clipping)
        found = stability_threshold(snapshot, **exact)
        close(found.courant, courant, 1e-6)
        if clipping is not None:
            continue
        dense = step_jacobian(snapshot, method="exact").dense()
        A, radius = from_matrix(dense), torch.linalg.eigvals(dense).abs().max()
        for window in (1, 2, 4, 8):
            exponent = sharp_mode_exponent([A] * window, found.mode, root=found.root, buffer_scale=found.buffer_scale)
            assert (exponent > 0) == (courant > 1), (courant, window)
            if courant > 1:
                close(exponent, radius.log(), 1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("name", DECAYED)
def test_decoupled_decay_moves_the_edge(name, decay):
    """An eigenvalue of the dense step crosses -1 where courant is 1."""
    problem = near_the_minimum(((1.0, 5),))
    optimizer = optimizer_at(DECAYED[name], problem, 1.0, weight_decay=decay)
    settings = {"steps": 5, "tol": 1e-12, "method": "exact"}
    low, high = 1e-3, 0.99 * 2 / decay if decay else 100.0
    for _ in range(40):  # courant grows with the rate, not linearly
        middle = optimizer.param_groups[0]["lr"] = (low * high) ** 0.5
        low, high = (
            (middle, high) if stability_threshold(freeze(problem, optimizer), **settings).courant < 1 else (low, middle)
        )
    eigenvalues = torch.linalg.eigvals(step_jacobian(freeze(problem, optimizer), method="exact").dense())
    close((eigenvalues + 1).abs().min(), 0.0, 1e-5)
    close(eigenvalues.abs().max(), 1.0, 1e-5)


def test_decoupled_decay_that_differs_is_taken_at_its_largest():
    problem = near_the_minimum()
    optimizer = optimizer_at(partial(AdamW, eps=0.1), problem, 1.0, weight_decay=0.2)
    both = stability_threshold(freeze(problem, optimizer), steps=5, tol=1e-12, method="exact").courant
    optimizer.param_groups[1]["weight_decay"] = 0.0
    close(stability_threshold(freeze(problem, optimizer), steps=5, tol=1e-12, method="exact").courant, both, 1e-12)
    for group in optimizer.param_groups:
        group["weight_decay"] = 2.0
    with pytest.raises(Unmeasurable, match="unstable by itself"):
        stability_threshold(freeze(problem, optimizer))


def test_adams_edge_is_38():
    """At beta1 = 0.9, late in training, on the preconditioned Hessian."""
    problem = near_the_minimum(((1.0, 5),))
    optimizer = optimizer_at(KINDS["adam"], problem, 1.0)
    for p in problem.parts:
        optimizer.state[p]["step"].fill_(10_000)
    found = stability_threshold(freeze(problem, optimizer), steps=5, tol=1e-12, method="exact")
    close(found.courant, 7.0 / 0.1 / 38, 1e-4)
    close(found.limit, 38 * 0.1, 1e-4)


@pytest.mark.parametrize("clipping", [None, Clipping(0.05), Clipping(0.02, "value")], ids=str)
@pytest.mark.parametrize("name", [*KINDS, *DECAYED])
def test_edge_is_the_dense_one(name, clipping):
    """On a network, against the eigenvalues of the dense product of torch's own preconditioner and Hessian."""
    problem = regression()
    parts = list(problem.parameters())
    optimizer = (KINDS | DECAYED)[name]([{"params": parts[:2]}, {"params": parts[2:], "lr": 0.01}], lr=0.05)
    for _ in range(3):
        take(optimizer, problem())
    snapshot = freeze(problem, optimizer, clipping=clipping)
    H, rule = dense_hessian(problem), coming_rule(snapshot)

    def flat(values):
        pieces = zip(values.values(), snapshot.parameters.values())
        return torch.cat([torch.as_tensor(x, dtype=f64).expand_as(p).reshape(-1) for x, p in pieces])

    rate = rule.lr / rule.correction
    stretched = rate * (flat(rule.scale)[:, None] * H + torch.diag(flat(rule.weight_decay)))
    found = stability_threshold(snapshot, steps=21, tol=1e-9, method="exact")
    top = torch.linalg.eigvals(stretched).real.max()
    beta, decay = rule.momentum, 0.05 * max(rule.decoupled_decay.values())
    constant = (2 + 2 * beta) / (1 - rule.dampening + rule.direct * (1 + beta)) * (1 - decay / 2)
    close(found.courant, top / constant, 1e-7)
    close(found.sharpness, torch.linalg.eigvalsh(H)[-1], 1e-7)
    close(found.top @ H @ found.top, found.sharpness, 1e-7)
    dense = preconditioned_hessian(snapshot, method="exact", rule=rule).dense()
    close(dense, dense.T, 1e-10)
    if clipping is None or clipping.kind == "norm":
        close(torch.linalg.eigvalsh(dense)[-1], top, 1e-9)
        R = rate * torch.diag(flat(rule.scale))
        product = torch.linalg.eigvals(R @ decayed_hessian(snapshot, method="exact").dense()).real.max()
        close(product, top, 1e-9)


def fitted(kind, steps, seed=0):
    net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(0.7 * random(*p.shape, seed=seed + k))
    x = random(12, 2, seed=5)
    problem = Regression(net, x, x[:, :1].sin() + 0.5 * x[:, 1:])
    optimizer = kind(problem.parameters())
    for _ in range(steps):
        take(optimizer, problem())
    return problem, optimizer


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop], ids=["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("lr", [0.02, 20.0])
def test_on_a_network_it_is_the_frozen_step_where_the_preconditioner_hardly_moves(kind, lr):
    settings = {"alpha": 0.999} if kind is RMSprop else {}
    problem, optimizer = fitted(lambda p: kind(p, lr=0.01, eps=0.5, **settings), 50)
    optimizer.param_groups[0]["lr"] = lr
    snapshot = freeze(problem, optimizer)
    found = stability_threshold(snapshot, steps=25, tol=1e-10, method="exact")
    rule, H = frozen_rule(snapshot), dense_hessian(problem)
    n, beta, I = len(H), rule.momentum, torch.eye(len(H), dtype=f64)  # noqa: E741
    R = rule.lr / rule.correction * torch.cat([torch.as_tensor(s).reshape(-1) for s in rule.scale.values()])
    keep = 1 - rule.lr * max(rule.decoupled_decay.values())
    m = torch.cat([(1 - rule.dampening) * H, beta * I], dim=1)
    frozen = torch.cat([torch.cat([keep * I, 0 * I], dim=1) - R[:, None] * m, m])
    A, v = step_jacobian(snapshot, method="exact"), found.root * found.mode
    plane = torch.zeros(2, 2 * n, dtype=f64)
    plane[0, :n], plane[1, n:] = v, found.mode / found.root
    inverse = torch.zeros(2, 2 * n, dtype=f64)
    inverse[0, :n], inverse[1, n:] = found.mode / found.root, found.mode * found.root
    window = torch.linalg.matrix_power(frozen, 4)
    truth = float(torch.linalg.eigvals(inverse @ window @ plane.T).abs().max().log()) / 4
    if not beta:
        truth = float(((window @ plane[0])[:n] / found.root @ found.mode).abs().log()) / 4
    close(sharp_mode_exponent([A] * 4, found.mode, root=found.root, buffer_scale=found.buffer_scale), truth, 0.02)
    assert (truth > 0) == (found.courant > 1) == (lr == 20.0)


@pytest.mark.parametrize("clipping", [None, Clipping(0.05)], ids=["free", "clipped"])
@pytest.mark.parametrize("kind", [Adam, AdamW, partial(RMSprop, momentum=0.8), Adagrad], ids=str)
def test_a_window_is_the_dense_product_of_exact_tangents(kind, clipping):
    problem, optimizer = fitted(lambda p: kind(p, lr=0.02), 5)
    metric, product, found = Lyapunov(window=3, method="exact"), 1.0, None
    for step in range(3):
        snapshot = freeze(problem, optimizer, step=step, clipping=clipping)
        metric.update(snapshot)
        A = step_jacobian(snapshot, method="exact").dense()
        if step == 0:
            found = followed_mode(snapshot, method="exact")
            n, scales = len(found.mode), (found.root, found.buffer_scale)[: 1 if found.buffer_scale is None else 2]
            into, back = torch.zeros(2, len(scales) + 1, len(A), dtype=f64)
            for k, scale in enumerate(scales):
                into[k, k * n : k * n + n], back[k, k * n : k * n + n] = scale * found.mode, found.mode / scale
            into[-1, len(scales) * n :] = (A @ into[0])[len(scales) * n :]  # what v does to the second moments
            back[-1] = into[-1] / into[-1].square().sum()
            product, decay = torch.eye(len(into), dtype=f64), 1.0
        small = back @ A @ into.T
        product, decay = small @ product, decay * small[-1, -1]
        take(optimizer, problem())  # the trajectory itself does not matter here
    values = torch.linalg.eigvals(product)
    truth = float(values[(values - decay).abs().argsort()[1:]].abs().max().log()) / 3
    close(metric.windows, [truth], 1e-9)
    assert math.isfinite(truth)


def test_the_cost_counts_the_runs():
    """SGD one, decays that differ three; three or four products each at first, then two to four.

    A preconditioner makes one of two metrics, with one product more, two at first. The last of three starts from the
    vector of the first.
    """
    problem = regression()
    parts = list(problem.parameters())
    groups = lambda: [{"params": parts[:2], "weight_decay": 0.1}, {"params": parts[2:]}]  # noqa: E731
    for optimizer, runs in (
        (SGD(parts, lr=0.1), 1), (AdamW(parts), 0), (AdamW(groups()), 0), (SGD(groups(), lr=0.1), 3)
    ):  # fmt: skip
        calls = []
        replay = lambda calls=calls: calls.append(1) or problem()  # noqa: E731
        snapshot = freeze(problem, optimizer, replay=replay)
        metric = Sharpness(method="finite_difference")
        cost = lambda: sum(metric.cost(snapshot).get(part, 0.0) for part in ("edge", "sharpness"))  # noqa: E731, B023

        def price(cold, snapshot=snapshot, runs=runs):
            return followed_cost(snapshot, "finite_difference", USUAL[1 if runs else 2][cold], runs or 1)

        assert cost() == pytest.approx(price(1))
        calls.clear()
        metric.update(freeze(problem, optimizer, replay=replay))
        least = COLD * min(runs, 2) + WARM * (runs > 2) if runs else COLD + 2
        assert least <= len(calls) <= (MOST * runs or MOST + 2) + 4  # and the replays of freeze and of the graph
        calls.clear()
        metric.update(freeze(problem, optimizer, replay=replay))
        assert cost() == pytest.approx(price(0))
        assert (WARM * runs or WARM + 1) <= len(calls) <= (MOST * runs or MOST + 2) + 4


def steps_of(replay, optimizer, problem, count):
    """Readings of a quantity along a few steps, with the same replay."""
    for step in range(count):
        yield freeze(problem, optimizer, step=step, replay=replay)
        take(optimizer, problem())


def test_a_followed_reading_of_a_smooth_loss_takes_three_replays():
    """One shows that the loss is smooth; `KnownGraph` spares it where the step's own graph was seen."""
    problem, calls = regression(), []
    optimizer, metric, counts = SGD(problem.parameters(), lr=0.01), Sharpness(), []
    for snapshot in steps_of(lambda: calls.append(1) or problem(), optimizer, problem, 14):
        calls.clear()
        metric.update(snapshot)
        counts.append(len(calls))
    assert min(counts) == WARM + 1 and sorted(counts)[len(counts) // 2] == WARM + 1


def test_a_replay_that_is_not_the_step_is_refused():
    problem, wrong = regression(), []
    optimizer, metric = SGD(problem.parameters(), lr=0.01), Sharpness()
    replay = lambda: problem() * (1.05 if wrong else 1.0)  # noqa: E731
    for snapshot in steps_of(replay, optimizer, problem, 3):
        metric.update(snapshot)
    snapshot = freeze(problem, optimizer, step=3)
    wrong.append(True)
    with pytest.raises(Unmeasurable, match="replay"):
        metric.update(replace(snapshot, replay=replay))


def test_a_network_that_gets_a_kink_is_measured_by_exact_products():
    """Differences would read the jump of the gradient as curvature."""
    problem = regression()
    optimizer, metric = SGD(problem.parameters(), lr=0.01), Sharpness()
    for snapshot in steps_of(problem, optimizer, problem, 3):
        metric.update(snapshot)
    net = next(m for m in problem.modules() if isinstance(m, torch.nn.Sequential))
    at = next(i for i, m in enumerate(net) if isinstance(m, torch.nn.Tanh))
    net[at] = torch.nn.ReLU()
    for _ in range(4):
        snapshot = freeze(problem, optimizer)
        metric.update(snapshot)
    values = metric.compute()
    truth = torch.linalg.eigvalsh(dense_hessian(problem))[-1]
    assert abs(truth / values["stability/sharpness"] - 1) <= values["stability/sharpness_residual"]


@pytest.mark.parametrize("kind", [Lion, torch.optim.Adadelta, Written], ids=["lion", "adadelta", "own"])
def test_without_an_edge_of_stability_the_eigenvalue_itself_is_measured(kind):
    """By dense brute force; the ratio to an edge that is not known is left out, with the reason."""
    problem = regression()
    optimizer, metric = kind(problem.parameters()), Sharpness(method="exact", bounded=True)
    snapshot = freeze(problem, optimizer)
    metric.check(snapshot)
    metric.update(snapshot)
    values = metric.compute()
    assert values.keys() == {"stability/sharpness", "stability/sharpness_residual"}
    top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    residual = float(values["stability/sharpness_residual"])
    assert abs(float(values["stability/sharpness"]) - top) <= residual * top and residual < 0.2
    monitor = Monitor(Sharpness(), every_n_steps=1)
    with pytest.warns(UserWarning, match="skips courant_gd and sharpness_limit .*not supported"):
        monitor.require(freeze(problem, optimizer))
    assert "stability/courant_gd" not in monitor.keys and monitor.headline is None
    assert monitor.observe(freeze(problem, optimizer)).values.keys() == set(metric.without_update)
    with pytest.raises(Unmeasurable, match="not supported"):
        Monitor(Sharpness(), strict=True).require(freeze(problem, optimizer))


def test_an_edge_that_is_lost_in_mid_run_is_told_once():
    problem = regression()
    sgd, monitor = torch.optim.SGD(problem.parameters(), lr=0.1, momentum=0.9), Monitor(Sharpness(), every_n_steps=1)
    monitor.require(freeze(problem, sgd))
    assert "stability/courant_gd" in monitor.observe(freeze(problem, sgd)).values
    parts = list(problem.parameters())
    twice = torch.optim.SGD([{"params": parts[:1]}, {"params": parts[1:], "momentum": 0.5}], lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="skips courant_gd .*different momentum"):
        values = monitor.observe(freeze(problem, twice, step=1)).values
    assert "stability/sharpness" in values and "stability/courant_gd" not in values
