"""Optimizers without a formula: their own step, differentiated on copies."""

import copy
from functools import partial

import pytest
import torch
from optimizer_zoo import HalfState, Lion, Lookahead, ScheduleFree, matrices_and_rest
from problems import (
    Quadratic,
    Regression,
    Written,
    close,
    f64,
    freeze,
    random,
    same,
    symmetric,
    take,
    tanh_mlp,
    trajectory,
)

from lsp_callbacks import Lyapunov, LyapunovTrajectory, SGDStability, Unmeasurable
from lsp_callbacks.autograd._torch_internals import copied_optimizer
from lsp_callbacks.linalg import LinearOperator, push
from lsp_callbacks.operators import hessian, step_jacobian, tangent_path
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_gradient
from lsp_callbacks.operators.trajectory.step_by_differences import difference_tangent
from lsp_callbacks.step.clipping import Clipping

optim = torch.optim


class SignSGD(Written):
    def update(self, p, state):
        return p.grad.sign()


class Noisy(Written):
    """Draws at each step."""

    def update(self, p, state):
        return p.grad * (1 + torch.rand_like(p))


class Rounded(Written):
    def update(self, p, state):
        return p.grad.to(torch.bfloat16).to(p.dtype)


class Remembers(Written):
    def update(self, p, state):
        state["all"] = [*state.get("all", []), p.grad.clone()]
        return sum(state["all"])


class Quantised(Written):
    def update(self, p, state):
        state["m"] = (100 * p.grad).to(torch.int8)
        return p.grad


class Holds(Written):
    def update(self, p, state):
        self.last = p.grad.clone()
        return p.grad


class SAM(Written):
    def first_step(self):
        """Climbs."""


class NeedsClosure(Written):
    def step(self, closure):
        closure()


class Stubborn(Written):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


def small():
    return Regression(tanh_mlp(2, 3, 1), random(6, 2, seed=1), random(6, 1, seed=2))


def own_jacobian(snapshot):
    tangent, size = difference_tangent(snapshot, clipped_gradient(snapshot))
    H = hessian(snapshot, method="exact")
    return LinearOperator((size, size), lambda z: tangent(z, H @ z[: H.shape[0]]), dtype=H.dtype)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "kind, blocks",
    [
        (partial(optim.SGD, lr=0.3, momentum=0.9, nesterov=True), ("momentum_buffer",)),
        (partial(optim.AdamW, lr=0.1, weight_decay=0.3), ("exp_avg", "exp_avg_sq")),
        (partial(optim.Adagrad, lr=0.1), ("sum",)),
        (partial(optim.NAdam, lr=0.1), ("exp_avg", "exp_avg_sq")),
        (partial(optim.RAdam, lr=0.1, betas=(0.9, 0.8)), ("exp_avg", "exp_avg_sq")),
        (partial(optim.Adamax, lr=0.1), ("exp_avg", "exp_inf")),
    ],
    ids=["sgd", "adamw", "adagrad", "nadam", "radam", "adamax"],
)
def test_it_agrees_with_the_formula_where_there_is_one(kind, blocks, steps):
    """Two witnesses of one another: the blocks of the one are ordered by name, of the other by parameter."""
    problem = small()
    optimizer = kind(problem.parameters())
    for _ in range(steps):
        take(optimizer, problem())
    snapshot = freeze(problem, optimizer)
    sizes = [p.numel() for p in problem.parameters()]
    n = sum(sizes)
    z = torch.zeros(1 + len(blocks), n, dtype=f64)
    z[0] = random(n)
    for k, name in enumerate(blocks):
        own = [optimizer.state.get(p, {}).get(name) for p in problem.parameters()]
        z[k + 1] = random(n, seed=k + 1) * torch.cat(
            [torch.zeros(m, dtype=f64) if s is None else s.abs().reshape(-1) for s, m in zip(own, sizes)]
        )
    exact = (step_jacobian(snapshot, method="exact") @ z.reshape(-1)).view_as(z)
    by_parameter = lambda x: torch.cat([x[0], *(b for bs in zip(*(y.split(sizes) for y in x[1:])) for b in bs)])  # noqa: E731
    found = own_jacobian(snapshot) @ by_parameter(z)
    for a, b in zip(
        found.split([n, *(m for m in sizes for _ in blocks)]),
        by_parameter(exact).split([n, *(m for m in sizes for _ in blocks)]),
    ):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp_min(1e-6)


def lookahead(parameters):
    return Lookahead(optim.SGD(parameters, lr=0.1, momentum=0.9))


KINDS = [
    partial(optim.Adadelta, lr=0.5), partial(optim.ASGD, lr=0.1), partial(optim.Adafactor, lr=0.05),
    partial(ScheduleFree, lr=0.05), Written, lookahead,
]  # fmt: skip


@pytest.mark.parametrize("clipping", [None, Clipping(0.05)], ids=["free", "clipped"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: getattr(k, "func", k).__name__)
def test_three_steps_are_differentiated_like_the_real_ones(kind, clipping):
    """A displacement of the parameters, followed through real steps of two displaced runs."""
    problem = small()
    optimizer = kind(problem.parameters())
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # replaces optimizer.step by one that is bound to the original

    def real(problem, optimizer):
        optimizer.zero_grad()
        problem().backward()
        if clipping is not None:
            torch.nn.utils.clip_grad_norm_(problem.parameters(), clipping.limit)
        type(optimizer).step(optimizer)

    for _ in range(8):  # RAdam begins as SGD
        real(problem, optimizer)
    direction, ends = random(13), []
    for e in (1e-5, -1e-5):
        memo = {}
        other, own = copy.deepcopy(problem, memo), copied_optimizer(optimizer, memo)
        with torch.no_grad():
            for p, d in zip(other.parameters(), direction.split([p.numel() for p in other.parameters()])):
                p += e * d.view_as(p)
        for _ in range(3):
            real(other, own)
        ends.append(torch.cat([p.detach().reshape(-1) for p in other.parameters()]))
    truth = (ends[0] - ends[1]) / 2e-5
    z = None
    for step in range(3):
        snapshot = freeze(problem, optimizer, step=step, clipping=clipping)
        before, state = copy.deepcopy((problem.state_dict(), optimizer.state_dict())), torch.get_rng_state()
        assert tangent_path(snapshot) == "finite_difference_of_step"
        A = step_jacobian(snapshot, method="exact")
        if z is None:
            z = torch.cat([direction, torch.zeros(A.shape[1] - 13, dtype=f64)])
        z = A @ z
        assert same(before, (problem.state_dict(), optimizer.state_dict())) and torch.equal(
            state, torch.get_rng_state()
        )
        real(problem, optimizer)
    close(z[:13], truth, 1e-6)


def test_random_numbers_of_a_step_are_the_same_on_both_sides_and_the_global_state_stays():
    problem = Quadratic(symmetric([1.0, 2.0]))
    optimizer = Noisy(problem.parameters(), lr=0.1)
    torch.manual_seed(0)
    factor, _ = 1 + torch.rand(2, dtype=f64), torch.manual_seed(0)
    state = torch.get_rng_state()
    A = step_jacobian(freeze(problem, optimizer), method="exact").dense()
    assert torch.equal(state, torch.get_rng_state())
    close(A, torch.eye(2, dtype=f64) - 0.1 * factor[:, None] * symmetric([1.0, 2.0]), 1e-9)


def test_what_has_no_gradient_or_is_not_held_stays():
    problem = small()
    parts = list(problem.parameters())
    A = step_jacobian(freeze(problem, Written(parts[:2])), method="exact")
    frame = torch.zeros(1, A.shape[1], dtype=f64)
    frame[0, 9:13] = 1.0
    pushed = push(A, frame)[0]
    close(pushed[9:13], torch.ones(4), 1e-9)  # not held
    problem.unused = torch.nn.Parameter(random(2))
    A = step_jacobian(freeze(problem, Written(problem.parameters())), method="exact")
    z = torch.zeros(A.shape[1], dtype=f64)
    names = [name for name, _ in problem.named_parameters()]
    start = sum(p.numel() for name, p in problem.named_parameters() if names.index(name) < names.index("unused"))
    z[start : start + 2] = 1.0
    close(A @ z, z, 1e-9)


REFUSED = {
    "lion": (Lion, "used signs"),
    "signsgd": (SignSGD, "used signs"),
    "rprop": (optim.Rprop, "used signs"),
    "rounded": (Rounded, "rounded"),
    "remembers": (Remembers, "remembers more"),
    "half_state": (HalfState, "rounds its state to bfloat16"),
    "two_as_one": (matrices_and_rest(partial(optim.AdamW), partial(optim.SGD, lr=0.1)), "remembers more"),
    "quantised": (Quantised, "remembers more"),
    "holds": (Holds, "remembers more"),
    "sam": (SAM, "two gradients"),
    "closure": (NeedsClosure, "closure"),
    "lbfgs": (optim.LBFGS, "closure"),
    "stubborn": (Stubborn, "no copies"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    kind, reason = REFUSED[name]
    problem = small()
    snapshot = freeze(problem, kind(problem.parameters()))
    for measure in (LyapunovTrajectory().check, LyapunovTrajectory().update):
        with pytest.raises(Unmeasurable, match=reason):
            measure(snapshot)


def test_the_derivative_of_a_sign_would_be_calm_where_runs_part():
    """The number that is avoided: almost everywhere a step of Lion is a shift, whose exponent is ``ln(1 - lr wd)``."""
    H, lr, decay, apart = symmetric([1.0, 30.0, 3.0]), 0.02, 0.1, 1e-4
    ends = []
    for shift in (0.0, apart):
        problem = Quadratic(H)
        with torch.no_grad():
            problem.parts[0][0] += shift
        optimizer = Lion(problem.parameters(), lr=lr, weight_decay=decay)
        for _ in range(1000):
            take(optimizer, problem())
        ends.append(problem.parts[0].detach().clone())
    by_derivative = apart * (1 - lr * decay) ** 1000
    assert (ends[1] - ends[0]).norm() > 1e3 * by_derivative


def test_a_rounded_state_would_lose_its_momentum():
    """The number that is avoided: differences see no change of a state in bfloat16, and forget the buffer."""
    H, lr = symmetric([1.0, 30.0]), 0.1
    problem = Quadratic(H)
    rounded, exact = HalfState(problem.parameters(), lr=lr), optim.SGD(problem.parameters(), lr=lr, momentum=0.9)
    for optimizer in (rounded, exact):
        take(optimizer, problem())
    wrong = own_jacobian(freeze(problem, rounded)).dense()
    right = step_jacobian(freeze(problem, exact), method="exact").dense()
    assert torch.linalg.matrix_norm(wrong[2:], 2) < 1e-3 * torch.linalg.matrix_norm(right[2:], 2)
    with pytest.raises(Unmeasurable, match="rounds its state"):
        tangent_path(freeze(problem, rounded))


@pytest.mark.parametrize("quantity", [Lyapunov, SGDStability])
def test_what_needs_a_sharp_mode_refuses_it_with_a_sentence(quantity):
    problem = small()
    with pytest.raises(Unmeasurable, match="update of Written is not supported"):
        quantity().check(freeze(problem, Written(problem.parameters())))


def test_the_exponent_over_all_parameters_says_which_way_it_went():
    H, paths = symmetric([0.5, 1.0, 30.0]), []
    for kind in (Written, lambda p: optim.SGD(p, lr=0.1, momentum=0.5)):
        problem = Quadratic(H)
        metric = LyapunovTrajectory(transient=40, window=40, method="exact")
        for snapshot in trajectory(problem, kind(problem.parameters()), 80):
            metric.update(snapshot)
        # x = 3 beyond the edge of beta = 0.5 at 3: the larger root of z^2 - (1.5 - 3) z + 0.5.
        values = metric.compute()
        close(values["stability/lyapunov_trajectory"], 0.0, 1e-3)
        paths.append(metric.path(snapshot))
    assert paths == ["exact, finite difference of step", "exact"]
