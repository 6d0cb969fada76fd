"""The Jacobian of a step against finite differences of torch.optim.SGD itself."""

import copy
import math

import pytest
import torch
from problems import Quadratic, Regression, close, f64, freeze, random, symmetric, take, tanh_mlp
from torch import Tensor, nn

from lsp_callbacks import Unmeasurable
from lsp_callbacks.operators import decayed_hessian, state_weight, step_jacobian, update_rule
from lsp_callbacks.snapshot import flatten

SGD = torch.optim.SGD


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
    for name, settings in MODES.items():
        yield pytest.param(Small, lambda p, s=settings: SGD(p.parameters(), **s), id=name)
    for name, second in GROUPS.items():
        settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
        yield pytest.param(Small, lambda p, s=second, a=settings: SGD(two_groups(p, **s), **a), id=f"group_{name}")
    for name in ("plain", "momentum", "nesterov_weight_decay"):
        make = lambda p, s=MODES[name]: SGD(p.parameters(), **s)  # noqa: E731
        yield pytest.param(TwoHeads, make, id=f"no_gradient_{name}")
    held = lambda p: SGD(list(p.parameters())[:2], lr=0.3, momentum=0.9)  # noqa: E731
    yield pytest.param(Small, held, id="not_held")


def read(problem, optimizer, buffers: Tensor) -> Tensor:
    """The state ``(theta, m)`` of a real optimizer; where there is no buffer, that of ``buffers``."""
    parameters = list(problem.parameters())
    theta = flatten(parameters, parameters).detach()
    parts = buffers.split([p.numel() for p in parameters])
    own = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    return torch.cat([theta, *(part if b is None else b.reshape(-1) for b, part in zip(own, parts))])


def really(problem, optimizer, batches, z: Tensor) -> Tensor:
    """The state after real steps of a copy that starts displaced by ``z``."""
    problem, optimizer = copy.deepcopy((problem, optimizer))
    parameters = list(problem.parameters())
    v, m = z.split([p.numel() for p in parameters] * 2)[: len(parameters)], z[z.numel() // 2 :]
    with torch.no_grad():
        for p, dv, dm in zip(parameters, v, m.split([p.numel() for p in parameters])):
            p += dv.view_as(p)
            if optimizer.state[p].get("momentum_buffer") is not None:
                optimizer.state[p]["momentum_buffer"] += dm.view_as(p)
    for rows in batches:
        take(optimizer, problem(rows))
    return read(problem, optimizer, m)


def differentiated(problem, optimizer, batches, columns: int) -> Tensor:
    """Central differences, column by column; the error is O(1e-10) in float64."""
    size = 2 * sum(p.numel() for p in problem.parameters())
    e = 1e-5 * torch.eye(size, dtype=f64)[:columns]
    return torch.stack(
        [(really(problem, optimizer, batches, c) - really(problem, optimizer, batches, -c)) / 2e-5 for c in e], dim=1
    )


def modelled(problem, optimizer, jacobian: Tensor) -> Tensor:
    """Which entries of the Jacobian stand for something: buffers that exist after the step, or none at all."""
    parameters = list(problem.parameters())
    exists = [optimizer.state[p].get("momentum_buffer") is not None for p in parameters]
    buffers = flatten([torch.full_like(p, x) for p, x in zip(parameters, exists)], parameters).bool()
    return torch.cat([torch.ones_like(buffers), buffers])[: len(jacobian)]


@pytest.mark.parametrize("started", [False, True], ids=["first_step", "later"])
@pytest.mark.parametrize("problem, make", list(cases()))
def test_step_jacobian_is_the_derivative_of_the_real_step(problem, make, started):
    problem = problem()
    optimizer = make(problem)
    if started:
        problem.both = True
        take(optimizer, problem())
        problem.both = False
    rows = BATCHES[0]
    snapshot = freeze(problem, optimizer, replay=lambda: problem(rows))
    A = step_jacobian(snapshot, method="exact").dense()
    truth = differentiated(problem, optimizer, [rows], len(A))[: len(A)]
    take(optimizer, problem(rows))
    real = modelled(problem, optimizer, A)
    assert real.sum() >= len(real) / 2
    close(A[real][:, real], truth[real][:, real], 1e-8)


@pytest.mark.parametrize("name", MODES)
def test_products_of_consecutive_jacobians_are_the_derivative_of_the_real_steps(name):
    problem = Small()
    optimizer = SGD(problem.parameters(), **MODES[name])
    size = (1 + update_rule(freeze(problem, optimizer)).has_state) * 13
    truth = differentiated(problem, optimizer, BATCHES, size)[:size]
    product, rough = None, None
    for step, rows in enumerate(BATCHES):
        snapshot = freeze(problem, optimizer, replay=lambda rows=rows: problem(rows), step=step)
        exact, differences = (step_jacobian(snapshot, method=m).dense() for m in ("exact", "finite_difference"))
        product, rough = (exact, differences) if product is None else (exact @ product, differences @ rough)
        take(optimizer, problem(rows))
    close(product, truth, 1e-8)
    close(rough, truth, 1e-5)


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
    problem = Small()
    optimizer = SGD(problem.parameters(), lr=0.3, momentum=0.9)
    early = freeze(problem, optimizer)
    optimizer.param_groups[0] |= {"lr": 0.01, "momentum": 0.5}  # as schedulers do
    rule = update_rule(freeze(problem, optimizer))
    assert set(rule.lr) == {0.01} and set(rule.momentum) == {0.5}
    assert set(update_rule(early).started) == {False}


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
    close(A[:13], differentiated(problem, optimizer, [slice(None)], len(A))[:13], 1e-8)


def test_a_tensor_as_rate_is_a_number():
    problem = Small()
    snapshot = freeze(problem, SGD(problem.parameters(), lr=torch.tensor(0.25)))
    assert update_rule(snapshot).lr == [0.25] * 4


def test_state_weight_makes_both_halves_displacements():
    problem = Small()
    optimizer = SGD(two_groups(problem, lr=0.0), lr=0.3, momentum=0.9)
    weight = state_weight(freeze(problem, optimizer))
    close(weight, torch.tensor([1.0] * 13 + [0.3] * 9 + [1.0] * 4), 1e-7)
    assert state_weight(freeze(problem, SGD(problem.parameters(), lr=0.3))) == 1.0


def test_groups_of_both_signs_have_no_symmetric_hessian():
    problem = Small()
    groups = two_groups(problem, maximize=True)
    with pytest.raises(Unmeasurable, match="maximize"):
        decayed_hessian(freeze(problem, SGD(groups, lr=0.1)))


def test_not_a_number_spreads_and_does_not_raise():
    problem = Quadratic(torch.full((2, 2), math.nan, dtype=f64))
    snapshot = freeze(problem, SGD(problem.parameters(), lr=0.1), loss=None)
    assert step_jacobian(snapshot).dense().isnan().all()
