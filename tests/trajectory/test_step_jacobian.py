"""The Jacobian of a step against finite differences of the torch.optim classes themselves."""

import copy
import math
from functools import partial

import pytest
import torch
from problems import Quadratic, Regression, close, f64, freeze, random, same, seeded, symmetric, take, tanh_mlp
from torch import Tensor, nn, optim

from lsp_callbacks import Snapshot, Unmeasurable
from lsp_callbacks.linalg import push
from lsp_callbacks.operators import state_blocks, state_weight, step_jacobian, tangent_path
from lsp_callbacks.operators.curvature.stability_threshold import stability_threshold
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.flat import flatten

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad


class Small(Regression):
    """13 parameters."""

    def __init__(self):
        super().__init__(tanh_mlp(2, 3, 1), random(6, 2, seed=1), random(6, 1, seed=2))


class TwoHeads(Small):
    """The second head is not used, so that its parameters have no gradient, unless ``both``."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 1).double()
        self.both = False

    def forward(self, rows=slice(None)):
        loss = super().forward(rows)
        return loss + self.other(self.x[rows]).tanh().mean() if self.both else loss


def two_groups(problem, **second):
    parts = list(problem.parameters())
    return [{"params": parts[:2]}, {"params": parts[2:], **second}]


MODES = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.3, "momentum": 0.9},
    "dampening": {"lr": 0.3, "momentum": 0.9, "dampening": 0.4},
    "dampening_without_momentum": {"lr": 0.3, "dampening": 0.4},
    "nesterov": {"lr": 0.3, "momentum": 0.9, "nesterov": True},
    "weight_decay": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.2},
    "nesterov_weight_decay": {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    "maximize": {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2, "maximize": True},
    "rate_zero": {"lr": 0.0, "momentum": 0.9},
}
OTHERS = {
    "adam": partial(Adam, lr=0.1),
    "adam_decay": partial(Adam, lr=0.1, weight_decay=0.3, betas=(0.7, 0.9)),
    "adam_maximize": partial(Adam, lr=0.1, weight_decay=0.3, maximize=True),
    "adam_no_momentum": partial(Adam, lr=0.1, betas=(0.0, 0.9)),
    "adam_large_eps": partial(Adam, lr=0.1, eps=0.1),
    "adam_decoupled": partial(Adam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "adam_not_foreach": partial(Adam, lr=0.1, foreach=False),
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.3),
    "adamw_amsgrad": partial(AdamW, lr=0.1, weight_decay=0.3, amsgrad=True, betas=(0.8, 0.5)),
    "adamw_rate_zero": partial(AdamW, lr=0.0),
    "adamw_tensor_rate": partial(AdamW, lr=torch.tensor(0.125), weight_decay=0.3),
    "rmsprop": partial(RMSprop, lr=0.1),
    "rmsprop_momentum": partial(RMSprop, lr=0.1, momentum=0.8, alpha=0.9, weight_decay=0.3),
    "rmsprop_centered": partial(RMSprop, lr=0.1, centered=True, alpha=0.8),
    "rmsprop_everything": partial(RMSprop, lr=0.1, centered=True, momentum=0.8, weight_decay=0.3, maximize=True),
    "nadam": partial(optim.NAdam, lr=0.1),
    "nadam_decay": partial(optim.NAdam, lr=0.1, weight_decay=0.3, betas=(0.7, 0.9), momentum_decay=0.3, maximize=True),
    "nadam_decoupled": partial(optim.NAdam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True, eps=0.1),
    "nadam_no_momentum": partial(optim.NAdam, lr=0.1, betas=(0.0, 0.9), foreach=False),
    "radam": partial(optim.RAdam, lr=0.1),
    "radam_rectified": partial(optim.RAdam, lr=0.1, betas=(0.7, 0.9), maximize=True, weight_decay=0.3, eps=1e-3),
    "radam_rectified_early": partial(optim.RAdam, lr=0.1, betas=(0.7, 0.7)),
    "radam_decoupled": partial(optim.RAdam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "adamax": partial(optim.Adamax, lr=0.1),
    "adamax_decay": partial(optim.Adamax, lr=0.1, betas=(0.7, 0.6), maximize=True, weight_decay=0.3, eps=1e-3),
    "adagrad": partial(Adagrad, lr=0.1),
    "adagrad_everything": partial(
        Adagrad, lr=0.1, lr_decay=0.3, weight_decay=0.3, initial_accumulator_value=0.2, maximize=True
    ),
}
#: Options of the second group that differ from those of the first.
OTHER_GROUPS = {
    "adam": (
        partial(Adam, lr=0.1),
        {"lr": 0.02, "betas": (0.5, 0.8), "amsgrad": True, "weight_decay": 0.4, "eps": 0.1},
    ),
    "rmsprop": (partial(RMSprop, lr=0.1), {"momentum": 0.5, "centered": True, "lr": 0.02}),
    "nadam": (partial(optim.NAdam, lr=0.1), {"lr": 0.02, "momentum_decay": 0.3, "weight_decay": 0.4}),
    "radam": (partial(optim.RAdam, lr=0.1, betas=(0.9, 0.8)), {"lr": 0.02, "betas": (0.5, 0.9), "eps": 0.1}),
    "adamax": (partial(optim.Adamax, lr=0.1), {"lr": 0.02, "betas": (0.5, 0.8), "weight_decay": 0.4}),
    "adagrad": (partial(Adagrad, lr=0.1), {"lr_decay": 0.5, "weight_decay": 0.4}),
}
CLIPPINGS = {"norm": Clipping(0.05), "loose": Clipping(100.0), "value": Clipping(0.02, "value")}
GROUPS = {
    "rates": {"lr": 0.02},
    "decays": {"weight_decay": 0.5},
    "everything": {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.3, "dampening": 0.2},
    "nesterov_in_one": {"momentum": 0.5, "nesterov": True},
    "momentum_in_one": {"momentum": 0.0},
    "frozen_group": {"lr": 0.0},
}
BATCHES = (slice(0, 3), slice(2, 6), slice(1, 5))


def cases():
    sgd = {name: partial(SGD, **settings) for name, settings in MODES.items()}
    for name, kind in (sgd | OTHERS).items():
        yield pytest.param(Small, lambda p, k=kind: k(p.parameters()), None, id=name)
    groups = {name: (partial(SGD, lr=0.3, momentum=0.9, weight_decay=0.1), second) for name, second in GROUPS.items()}
    for name, (kind, second) in (groups | OTHER_GROUPS).items():
        yield pytest.param(Small, lambda p, k=kind, s=second: k(two_groups(p, **s)), None, id=f"group_{name}")
    for name in ("plain", "momentum", "nesterov_weight_decay", "adamw_amsgrad", "rmsprop_everything", "adagrad"):
        kind = (sgd | OTHERS)[name]
        yield pytest.param(TwoHeads, lambda p, k=kind: k(p.parameters()), None, id=f"no_gradient_{name}")
        yield pytest.param(Small, lambda p, k=kind: k(list(p.parameters())[:2]), None, id=f"not_held_{name}")
        for which, clipping in CLIPPINGS.items():
            yield pytest.param(Small, lambda p, k=kind: k(p.parameters()), clipping, id=f"clipped_{which}_{name}")
    held = lambda p: AdamW(list(p.parameters())[:2], lr=0.1)  # noqa: E731
    yield pytest.param(TwoHeads, held, CLIPPINGS["norm"], id="not_held_clipped")


def clip(problem, optimizer, clipping: Clipping | None) -> None:
    """With torch's own functions, as Lightning does: over the parameters of the optimizer."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if clipping is not None and clipping.kind == "norm":
        nn.utils.clip_grad_norm_(own, clipping.limit)
    elif clipping is not None:
        nn.utils.clip_grad_value_(own, clipping.limit)


def real_step(problem, optimizer, loss: Tensor, clipping: Clipping | None = None) -> None:
    optimizer.zero_grad()
    loss.backward()
    clip(problem, optimizer, clipping)
    optimizer.step()


def read(problem, optimizer, blocks, z: Tensor) -> Tensor:
    """The state ``(theta, s_1, ...)`` of a real optimizer; where there is none, that of ``z``."""
    parameters = list(problem.parameters())
    sizes = [p.numel() for p in parameters]
    values = [flatten(parameters, parameters).detach()]
    for name, flat in zip(blocks, z.view(1 + len(blocks), -1)[1:]):
        own = [optimizer.state.get(p, {}).get(name) for p in parameters]
        values += [part if x is None else x.reshape(-1) for x, part in zip(own, flat.split(sizes))]
    return torch.cat(values)


def really(problem, optimizer, batches, blocks, z: Tensor, clipping=None) -> Tensor:
    """The state after real steps of a copy that starts displaced by ``z``."""
    problem, optimizer = copy.deepcopy((problem, optimizer))
    parameters = list(problem.parameters())
    sizes = [p.numel() for p in parameters]
    with torch.no_grad():
        for k, block in enumerate(z.view(1 + len(blocks), -1)):
            for p, dz in zip(parameters, block.split(sizes)):
                target = p if k == 0 else optimizer.state.get(p, {}).get(blocks[k - 1])
                if target is not None:
                    target += dz.view_as(target)
    for rows in batches:
        real_step(problem, optimizer, problem(rows), clipping)
    return read(problem, optimizer, blocks, z)


def directions(problem, optimizer, batches, blocks, clipping, each: int = 1) -> Tensor:
    """Random ones within each block, at a distance that suits what they move, ``(k, size)``."""
    n = sum(p.numel() for p in problem.parameters())
    nothing = torch.zeros((1 + len(blocks)) * n, dtype=f64)
    after = really(problem, optimizer, batches[:1], blocks, nothing, clipping).view(-1, n)
    found = torch.zeros(1 + len(blocks), each, 1 + len(blocks), n, dtype=f64)
    for j, name in enumerate(("theta", *blocks)):
        # Second moments must stay positive.
        size = 1e-5 if name in ("theta", *LINEAR) else 1e-4 * after[j].abs()
        found[j, :, j] = size * random(each, n, seed=j)
    return found.view(-1, found[0, 0].numel())


def differentiated(problem, optimizer, batches, blocks, z: Tensor, clipping=None) -> Tensor:
    """Central differences of fourth order along each row of ``z``, as far as it goes."""

    def along(row: Tensor) -> Tensor:
        f = [really(problem, optimizer, batches, blocks, s * row, clipping) for s in (1, -1, 2, -2)]
        return (8 * (f[0] - f[1]) - (f[2] - f[3])) / 12

    return torch.stack([along(row) for row in z])


#: What the update depends on linearly.
LINEAR = ("momentum_buffer", "exp_avg")


def existing(problem, optimizer, blocks) -> Tensor:
    """Which entries of the state stand for something."""
    parameters = list(problem.parameters())
    masks = [torch.ones(sum(p.numel() for p in parameters), dtype=torch.bool)]
    for name in blocks:
        there = [optimizer.state.get(p, {}).get(name) is not None for p in parameters]
        masks.append(flatten([torch.full_like(p, x) for p, x in zip(parameters, there)], parameters).bool())
    return torch.cat(masks)


def close_by_block(found: Tensor, truth: Tensor, real: Tensor, blocks: int, tol: float, rounding: Tensor) -> None:
    """Each block of each row against its own largest entry: second moments are small numbers."""
    n = found.shape[1] // blocks
    for a, b, here, bound in zip(*(x.split(n, -1) for x in (found, truth, real)), rounding.split(n)):
        for row, expected in zip(a[:, here], b[:, here]):
            error = (row - expected).abs()
            assert (error <= tol * expected.abs().max() + 1e-15 * bound[here].abs().max()).all(), error.max()


def check_step(problem, optimizer, snapshot, batches, apply, tol, clipping=None) -> None:
    """``apply`` against the differences of real steps."""
    blocks = state_blocks(snapshot)
    z = directions(problem, optimizer, batches, blocks, clipping)
    there = existing(problem, optimizer, blocks)
    z = torch.where(there, z, 0.0)
    found, truth = apply(z), differentiated(problem, optimizer, batches, blocks, z, clipping)
    end = copy.deepcopy((problem, optimizer))
    for rows in batches:
        real_step(*end, end[0](rows), clipping)
    real = existing(*end, blocks)
    close_by_block(found, truth, real, 1 + len(blocks), tol, read(*end, blocks, torch.zeros_like(z[0])) + 1e-9)


@pytest.mark.parametrize("steps", [0, 3], ids=["first_step", "later"])
@pytest.mark.parametrize("problem, make, clipping", list(cases()))
def test_step_jacobian_is_the_derivative_of_the_real_step(problem, make, clipping, steps):
    problem = problem()
    optimizer = make(problem)
    problem.both = True
    for k in range(steps):
        real_step(problem, optimizer, problem(BATCHES[k]), clipping)
    problem.both = False
    rows = BATCHES[0]
    snapshot = freeze(problem, optimizer, replay=lambda: problem(rows), clipping=clipping)
    before = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in problem.parameters()])
    A = step_jacobian(snapshot, method="exact")
    check_step(problem, optimizer, snapshot, [rows], lambda z: push(A, z), 1e-7, clipping)
    # It was only looked at.
    assert same([dict(optimizer.state.get(p, {})) for p in problem.parameters()], before)


@pytest.mark.parametrize("method, tol", [("exact", 1e-7), ("finite_difference", 1e-5)])
@pytest.mark.parametrize("name", [*MODES, "adamw", "rmsprop_everything", "adagrad_everything"])
def test_products_of_consecutive_jacobians_are_the_derivative_of_the_real_steps(name, method, tol):
    problem = Small()
    optimizer = OTHERS[name](problem.parameters()) if name in OTHERS else SGD(problem.parameters(), **MODES[name])
    if name in OTHERS:  # past the first step, where the state is there
        real_step(problem, optimizer, problem())
    start = copy.deepcopy((problem, optimizer))
    jacobians = []
    for step, rows in enumerate(BATCHES):
        snapshot = freeze(problem, optimizer, replay=lambda rows=rows: problem(rows), step=step)
        jacobians.append(step_jacobian(snapshot, method=method).dense())
        take(optimizer, problem(rows))
    product = jacobians[2] @ jacobians[1] @ jacobians[0]
    check_step(*start, freeze(*start), BATCHES, lambda z: z @ product.T, tol)


def test_where_no_gradient_was_ever_seen_the_derivative_is_finite():
    """An input that is always 0: its weights have nu = 0, where the square root has no derivative."""
    for kind in (Adam, partial(AdamW, amsgrad=True), partial(RMSprop, centered=True, momentum=0.9), Adagrad):
        problem = Small()
        problem.x[:, 0] = 0.0
        optimizer = kind(problem.parameters(), lr=0.1)
        for _ in range(3):
            take(optimizer, problem())
        A = step_jacobian(freeze(problem, optimizer), method="exact").dense()
        assert A.isfinite().all() and A[0, 0] == pytest.approx(1.0 if kind is not AdamW else 1 - 0.1 * 0.01, rel=0.01)


def test_one_cycle_moves_the_betas_and_the_step_reads_them():
    problem = Small()
    optimizer = AdamW(problem.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=9)
    betas = set()
    for _ in range(3):
        take(optimizer, problem())
        scheduler.step()
        betas.add(optimizer.param_groups[0]["betas"])
        snapshot = freeze(problem, optimizer)
        A = step_jacobian(snapshot, method="exact")
        check_step(problem, optimizer, snapshot, [slice(None)], lambda z, A=A: push(A, z), 1e-7)
    assert len(betas) == 3


class Own(AdamW):
    """Has nothing of its own."""


class OwnStep(AdamW):
    def step(self, closure=None):
        return super().step(closure)


def test_subclasses_are_the_modelled_optimizer_unless_they_have_a_step_of_their_own():
    problem = Small()
    assert tangent_path(freeze(problem, Own(problem.parameters()))) == "exact"
    with pytest.raises(Unmeasurable, match=r"OwnStep overrides Adam\.step"):
        step_jacobian(freeze(problem, OwnStep(problem.parameters())))


@pytest.mark.parametrize("name", MODES)
def test_closed_form_on_a_quadratic(name):
    """``theta^T H theta / 2``: every entry of the Jacobian by hand, after the first step."""
    H = symmetric([-1.0, 0.5, 3.0])
    lr, beta, tau, nesterov, decay, maximize = _settings(**MODES[name])
    problem = Quadratic(H)
    optimizer = SGD(problem.parameters(), **MODES[name])
    take(optimizer, problem())
    one = torch.eye(3, dtype=f64)
    d = (-H if maximize else H) + decay * one
    expected = one - lr * d
    if beta:
        m = (1 - tau) * d
        by_v, by_m = (d + beta * m, beta**2 * one) if nesterov else (m, beta * one)
        expected = torch.cat([torch.cat([one - lr * by_v, -lr * by_m], 1), torch.cat([m, beta * one], 1)])
    close(step_jacobian(freeze(problem, optimizer), method="exact").dense(), expected, 1e-13)


def _settings(lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, maximize=False):
    return lr, momentum, dampening, nesterov, weight_decay, maximize


def test_rates_and_betas_are_read_at_the_step():
    problem = Quadratic(symmetric([1.0, 2.0]))
    optimizer = SGD(problem.parameters(), lr=0.3, momentum=0.9)
    take(optimizer, problem())
    optimizer.param_groups[0] |= {"lr": 0.01, "momentum": 0.5}  # as schedulers do
    A = step_jacobian(freeze(problem, optimizer), method="exact").dense()
    close(A[2:, 2:], 0.5 * torch.eye(2, dtype=f64), 1e-14)
    close(A[:2, 2:], -0.005 * torch.eye(2, dtype=f64), 1e-14)


@pytest.mark.parametrize("groups", [1, 2])
def test_momentum_that_was_turned_off_leaves_its_buffer_out(groups):
    """Then PyTorch ignores the dampening, too."""
    problem = Small()
    optimizer = SGD(two_groups(problem), lr=0.3, momentum=0.9, dampening=0.4)
    take(optimizer, problem())
    for group in optimizer.param_groups[-groups:]:
        group["momentum"] = 0.0
    A = step_jacobian(freeze(problem, optimizer), method="exact").dense()
    assert A.shape == ((13, 13) if groups == 2 else (26, 26))
    z = 1e-5 * torch.eye(26, dtype=f64)[: len(A)]
    truth = differentiated(problem, optimizer, [slice(None)], ("momentum_buffer",), z).T * 1e5
    close(A[:13], truth[:13], 1e-8)


def test_state_weight_makes_both_halves_displacements():
    problem = Small()
    optimizer = SGD(two_groups(problem, lr=0.0), lr=0.3, momentum=0.9)
    take(optimizer, problem())
    snapshot = freeze(problem, optimizer)
    weight = state_weight(snapshot)
    close(weight, torch.tensor([1.0] * 13 + [0.27] * 9 + [1.0] * 4), 1e-7)
    plain = freeze(problem, SGD(problem.parameters(), lr=0.3))
    close(state_weight(plain), torch.ones(13), 0)
    adam = Adam(problem.parameters(), lr=0.1, betas=(0.5, 0.9), eps=0.2)
    take(adam, problem())
    snapshot = freeze(problem, adam)
    weight = state_weight(snapshot)
    take(adam, problem())
    nu = torch.cat([adam.state[p]["exp_avg_sq"].reshape(-1) for p in problem.parameters()])
    close(weight[13:], 0.1 * 0.5 / (1 - 0.5**2) / ((nu / (1 - 0.9**2)).sqrt() + 0.2), 1e-12)
    assert len(weight) == 26  # the second moments have no part in it


@pytest.mark.parametrize("kind", [partial(SGD, momentum=0.9), partial(RMSprop, momentum=0.9), Adam], ids=str)
def test_the_weight_of_a_buffer_does_not_jump_when_it_appears(kind):
    """Neither before the first step, nor in one at rate 0: the norm would be another, and have other units."""
    problem, weights = Small(), []
    optimizer = kind(problem.parameters(), lr=0.01)
    optimizer.param_groups[0]["initial_lr"] = 0.01
    for lr in (0.01, 0.0, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        weights.append(state_weight(freeze(problem, optimizer))[13:])
        take(optimizer, problem())
    for weight in weights[1:]:
        assert 0.2 < (weight / weights[0]).median() < 5


def test_groups_of_both_signs_have_no_common_edge():
    problem = Small()
    groups = two_groups(problem, maximize=True)
    with pytest.raises(Unmeasurable, match="maximize"):
        stability_threshold(freeze(problem, SGD(groups, lr=0.1)))


def test_a_gradient_that_is_not_known_is_replayed_for_the_tangent_and_refused_for_the_preconditioner():
    problem = Small()
    optimizer = AdamW(problem.parameters(), lr=0.1)
    take(optimizer, problem())
    known, unknown = freeze(problem, optimizer), Snapshot(0, problem, replay=problem, optimizer=optimizer)
    close(step_jacobian(unknown, method="exact").dense(), step_jacobian(known, method="exact").dense(), 1e-14)
    with pytest.raises(Unmeasurable, match="gradient="):
        stability_threshold(unknown)


@pytest.mark.parametrize("settings", [{"limit": 0.0}, {"limit": -1.0}, {"limit": 1.0, "kind": "global"}], ids=str)
def test_a_clipping_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match="Clipping"):
        Clipping(**settings)


def test_clipping_a_gradient_of_zeros_is_no_singularity():
    problem = Quadratic(symmetric([1.0, 2.0]))
    with torch.no_grad():
        problem.parts[0].zero_()
    for clipping in (Clipping(0.1), Clipping(0.1, "value")):
        snapshot = freeze(problem, SGD(problem.parameters(), lr=0.1), clipping=clipping)
        expected = torch.eye(2, dtype=f64) - 0.1 * symmetric([1.0, 2.0])
        close(step_jacobian(snapshot, method="exact").dense(), expected, 1e-12)


def test_not_a_number_spreads_and_does_not_raise():
    problem = Quadratic(torch.full((2, 2), math.nan, dtype=f64))
    snapshot = freeze(problem, SGD(problem.parameters(), lr=0.1), loss=None)
    assert step_jacobian(snapshot).dense().isnan().all()


@pytest.mark.parametrize("name", ["radam", "radam_rectified", "radam_decoupled", "nadam", "adamax"])
def test_later_steps_of_adams_variants_are_differentiated_like_the_real_ones(name):
    """RAdam has its preconditioner from the sixth step on."""
    problem = Small()
    optimizer = OTHERS[name](problem.parameters())
    for k in range(9):
        real_step(problem, optimizer, problem(BATCHES[k % 3]))
    snapshot = freeze(problem, optimizer)
    A = step_jacobian(snapshot, method="exact")
    check_step(problem, optimizer, snapshot, [slice(None)], lambda z: push(A, z), 1e-7)


def test_the_transpose_is_accurate_where_units_are_dead():
    """Adam's rate there is lr / eps: beside it a vector's other numbers would be lost in a difference of gradients."""
    net = seeded(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
    with torch.no_grad():
        net[2].bias[:2] = -3.0
    task = Regression(net, random(8, 3, seed=1), random(8, 1, seed=2)).float()
    adam = Adam(task.parameters(), lr=0.01)
    for _ in range(2):
        take(adam, task())
    snapshot = freeze(task, adam)
    exact, differences = (step_jacobian(snapshot, method=m).T for m in ("exact", "finite_difference"))
    w, live = random(exact.shape[1], seed=3).float(), snapshot.flat_gradient != 0
    assert 0 < live.sum() < len(live)
    close((differences @ w)[: len(live)][live], (exact @ w)[: len(live)][live], 1e-3)
