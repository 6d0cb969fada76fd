"""Differences at any scale: what holds for every model when its loss or its parameters are measured in other units."""

import copy
from functools import partial

import pytest
import torch
from problems import Regression, close, dense_hessian, f64, freeze, random, seeded, take, tanh_mlp, trajectory
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lsp_callbacks import Lyapunov, LyapunovTrajectory, Sharpness
from lsp_callbacks.operators import hessian, step_jacobian
from lsp_callbacks.operators.curvature.finite_differences import BACK, SAFETY, Differences
from lsp_callbacks.operators.curvature.hessian import path_taken
from lsp_callbacks.operators.curvature.parameter_lengths import lengths
from lsp_callbacks.operators.curvature.top_eigenvalue import top_eigenvalue
from lsp_callbacks.step.known_scale import Scale
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.snapshot import Snapshot

SGD, f32 = torch.optim.SGD, torch.float32
SHORT = [1e-6, 1e-3, 1e3, 1e6]
#: All pairs of the scales of loss and parameters; a few of them by default.
PAIRS = [
    pytest.param(c, s, marks=() if (c, s) in ((1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1.0, 1e6), (1e3, 1e-3)) else slow)
    for slow in [pytest.mark.slow]
    for c in (1e-6, 1e-3, 1.0, 1e3, 1e6)
    for s in (1e-6, 1e-3, 1.0, 1e3, 1e6)
]


class Units(nn.Module):
    """``c L(s phi)``: the same problem, its loss and its parameters in other units."""

    def __init__(self, problem, c, s):
        super().__init__()
        object.__setattr__(self, "problem", problem)
        self.c, self.s, self.names = c, s, [name for name, _ in problem.named_parameters()]
        self.own = nn.ParameterList(p.detach() / s for p in problem.parameters())

    def forward(self):
        return self.c * functional_call(self.problem, {n: self.s * p for n, p in zip(self.names, self.own)}, ())


class Classes(Regression):
    def forward(self, rows=slice(None)):
        return F.cross_entropy(self.net(self.x[rows]), torch.arange(len(self.x))[rows] % 3)


def convolution():
    net = nn.Sequential(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten())
    return Classes(seeded(nn.Sequential(net, nn.Linear(18, 3))), random(12, 12, seed=1), None)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, batch_first=True, norm_first=True, activation=F.gelu
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 3, 4)).mean(1))


NETWORKS = {
    "tanh": lambda: Regression(tanh_mlp(4, 8, 8, 2), random(16, 4, seed=1), random(16, 2, seed=2)),
    "convolution": convolution,
    "attention": lambda: Classes(seeded(Attention()), random(12, 12, seed=1), None),
}
#: Of a product, relative to the norm of H. Central differences would do better at twice the price.
ACCURACY = {f32: 0.01, f64: 1e-6}


def dense(problem):
    return dense_hessian(copy.deepcopy(problem).double())


def off(snapshot, H, count=3, method="auto"):
    """The largest error of a few products relative to the largest eigenvalue: of random vectors and the top one."""
    top = torch.linalg.eigh(H).eigenvectors[:, -1]
    vectors = [top, *random(count, len(H), seed=7)]
    operator, size = hessian(snapshot, method=method), torch.linalg.matrix_norm(H, 2)
    errors = [((operator @ v.to(operator.dtype)).double() - H @ v).norm() / (size * v.norm()) for v in vectors]
    return float(torch.stack(errors).max())


# Laws of every model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("c, s", PAIRS)
def test_products_follow_the_units(name, dtype, c, s):
    problem = NETWORKS[name]().to(dtype)
    H, snapshot = dense(problem), freeze(Units(problem, c, s))
    assert off(snapshot, c * s * s * H) < ACCURACY[dtype]
    assert path_taken(snapshot, "auto") == "finite difference"  # at no scale it gets dearer


def sgd(parameters, c=1.0, s=1.0):
    return SGD(parameters, lr=0.3 / c / s**2, momentum=0.9, weight_decay=0.01 * c * s**2)


def plain(parameters, c=1.0, s=1.0):
    return SGD(parameters, lr=0.3 / c / s**2, weight_decay=0.01 * c * s**2)


def adam(parameters, c=1.0, s=1.0):
    return torch.optim.Adam(parameters, lr=0.01 / s, eps=1e-8 * c * s)


def nadam(parameters, c=1.0, s=1.0):
    """Without a formula."""
    return torch.optim.NAdam(parameters, lr=0.01 / s, eps=1e-8 * c * s)


OPTIMIZERS = {"sgd": sgd, "plain": plain, "adam": adam, "nadam": nadam}


def run(problem, optimizer, quantity, steps, **settings):
    for snapshot in trajectory(problem, optimizer, steps, **settings):
        quantity.update(snapshot)
    return {key: float(value) for key, value in quantity.compute().items()}


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("maker", ["sgd", "adam"])
@pytest.mark.parametrize("c, s", PAIRS)
def test_sharpness_and_courant_numbers_follow_the_units(maker, dtype, c, s):
    found = []
    for units in ((1.0, 1.0), (c, s)):
        problem = Units(NETWORKS["tanh"]().to(dtype), *units)
        optimizer = OPTIMIZERS[maker](problem.parameters(), *units)
        for _ in range(3):
            take(optimizer, problem())
        found.append(run(problem, optimizer, Sharpness(), 1))
    plain, scaled = found
    assert scaled["stability/sharpness"] == pytest.approx(c * s * s * plain["stability/sharpness"], rel=5e-3)
    assert scaled["stability/courant_gd"] == pytest.approx(plain["stability/courant_gd"], rel=5e-3)


TRAJECTORY = partial(LyapunovTrajectory, transient=5, window=40)
EXPONENTS = {
    "lyapunov-sgd": ("sgd", partial(Lyapunov, window=4), 5),
    "lyapunov-adam": ("adam", partial(Lyapunov, window=4), 5),
    # Without momentum: the random frame that it starts from is drawn in the units of the buffers.
    "trajectory-sgd": ("plain", TRAJECTORY, 45),
    "trajectory-adam": ("adam", TRAJECTORY, 45),
    "trajectory-nadam": ("nadam", TRAJECTORY, 45),
}


@pytest.mark.parametrize("name", EXPONENTS)
@pytest.mark.parametrize(
    "c, s", [pytest.param(c, s, marks=() if s == 1e-6 else pytest.mark.slow) for c, s in (
        (1e6, 1.0), (1.0, 1e6), (1e-6, 1.0), (1e3, 1e-3), (1e6, 1e-6))]
)  # fmt: skip
@pytest.mark.parametrize("dtype", [f32, pytest.param(f64, marks=pytest.mark.slow)], ids=["float32", "float64"])
def test_exponents_do_not_depend_on_the_units(name, dtype, c, s):
    maker, quantity, steps = EXPONENTS[name]
    found = []
    for units in ((1.0, 1.0), (c, s)):
        problem = Units(Regression(tanh_mlp(2, 4, 1), random(6, 2, seed=1), random(6, 1, seed=2)).to(dtype), *units)
        values = run(problem, OPTIMIZERS[maker](problem.parameters(), *units), quantity(), steps)
        found.append(values["stability/lyapunov" if quantity.func is Lyapunov else "stability/lyapunov_trajectory"])
    assert found[1] == pytest.approx(found[0], abs=2e-3)


# Laws of a class ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("targets, weights", [(t, w) for t in (0.0, 1e-6, 1.0, 1e6) for w in (0.0, 1e-6, 1.0, 1e6)])
def test_targets_and_weights_of_a_linear_model_do_not_matter(method, dtype, targets, weights):
    x, y = random(32, 4, seed=1), random(32, 1, seed=2)
    net = nn.Linear(4, 1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(weights * random(*p.shape, seed=3))
    problem = Regression(net, x, targets * y).to(dtype)
    snapshot = freeze(problem)
    assert off(snapshot, dense(problem), method=method) < ACCURACY[dtype]


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("s", SHORT)
@pytest.mark.parametrize("k", [2, 3])
def test_homogeneous_networks(k, s, dtype):
    """Of degree k with squared loss: weights by s and targets by ``s^k`` make the Hessian ``s^(2k - 2)``."""
    if s ** (2 * k) > 1e30 and dtype == f32:
        pytest.skip("the loss itself has no room in float32")

    def made(s):
        net = seeded(nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(k)]))
        with torch.no_grad():
            for p in net.parameters():
                p *= s
        return Regression(net, random(16, 4, seed=1), s**k * random(16, 4, seed=2)).to(dtype)

    H = dense(made(1.0))
    assert off(freeze(made(s)), s ** (2 * k - 2) * H) < ACCURACY[dtype]


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("s", [1e-3, 1e-2, 0.1, 3.0, 10.0])
def test_where_no_law_holds_products_are_the_dense_ones(name, s, dtype):
    problem = NETWORKS[name]()
    with torch.no_grad():
        for p in problem.parameters():
            p *= s
    problem = problem.to(dtype)
    assert off(freeze(problem), dense(problem)) < {f32: 0.02, f64: 1e-5}[dtype]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("s", [30.0, 100.0])
def test_where_the_curvature_changes_within_a_step(name, s):
    """Saturated, with a loss of thousands that hides in its rounding what the third derivative does."""
    problem = NETWORKS[name]()
    with torch.no_grad():
        for p in problem.parameters():
            p *= s
    problem = problem.float()
    H = dense(problem)
    found = top_eigenvalue(freeze(problem), steps=len(H), tol=1e-3)
    close(found.value / torch.linalg.eigvalsh(H)[-1], 1.0, 0.02)


def test_products_that_are_not_symmetric_are_not_believed():
    problem = NETWORKS["convolution"]()
    with torch.no_grad():
        for p in problem.parameters():
            p *= 100
    snapshot, H = freeze(problem.float()), dense(problem)
    for v in (torch.linalg.eigh(H).eigenvectors.T[[-1, -2, -3, -1]]).float():
        found = hessian(snapshot) @ v
    assert path_taken(snapshot, "auto") == "exact"
    close(found, H @ v.double(), 1e-4 * float(torch.linalg.matrix_norm(H, 2)))


# Runs that leave, and runs that arrive ------------------------------------------------------------------------------


class Valley(nn.Module):
    """``theta^T diag(h) theta / 2`` in squares of a linear map, as a network has it."""

    def __init__(self, h, dtype):
        super().__init__()
        self.net = nn.Linear(len(h), len(h), bias=False).to(dtype)
        self.register_buffer("root", torch.tensor(h, dtype=dtype).sqrt().diag())
        self.register_buffer(
            "target", torch.arange(1.0, len(h) + 1, dtype=dtype).outer(torch.ones(len(h), dtype=dtype))
        )

    def forward(self):
        return 0.5 * (self.net(self.root) - self.target @ self.root).square().sum()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype, most", [(f32, 1e15), (f64, 1e30)], ids=["float32", "float64"])
def test_a_run_that_diverges(dtype, most, momentum):
    top = 4.0
    problem = Valley([0.5, 1.0, top], dtype)
    factor = 1.1 if momentum else 1.2
    lr = factor * (2 + 2 * momentum) / top
    optimizer, metric = SGD(problem.parameters(), lr, momentum=momentum), LyapunovTrajectory(transient=15, window=40)
    step = torch.tensor([[1 + momentum - lr * top, -momentum], [1.0, 0.0]], dtype=f64)
    exponent = float(torch.linalg.eigvals(step).abs().max().log())
    for k in range(10_000):
        if float(problem.net.weight.detach().abs().max()) > most:
            break
        snapshot = freeze(problem, optimizer, step=k)
        metric.update(snapshot)
        if k % 5 == 0:
            sharp = Sharpness()
            sharp.update(snapshot)
            close(sharp.compute()["stability/sharpness"] / top, 1.0, 0.02 if k < 3 else 0.01)
            close(sharp.compute()["stability/courant_gd"] / factor, 1.0, 0.02 if k < 3 else 0.01)
        if metric.complete:
            close(metric.compute()["stability/lyapunov_trajectory"], exponent, 2e-3)
        take(optimizer, problem())
    assert k > 55 and metric.growth.numel()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_run_that_converges_to_rounding(offset):
    """The last bits of the residuals are noise; with targets far above the weights' reach they are large."""
    x, y = random(16, 3, seed=1), random(16, 1, seed=2)

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + offset

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), Shifted(8, 1))
    problem = Regression(net.double(), x, 0.3 * y + offset).float()
    optimizer = SGD(problem.parameters(), 0.3, momentum=0.9)
    for k in range(601):
        if k % 100 == 0:
            assert off(freeze(problem, optimizer, step=k), dense(problem)) < 0.02
        take(optimizer, problem())


def test_saturated_cross_entropy():
    """``p - 1`` is rounded as 1 is: where the loss is small, the gradient is not as exact as it is small."""
    problem = Classes(tanh_mlp(12, 16, 3), random(12, 12, seed=1), None).float()
    optimizer = SGD(problem.parameters(), 0.5, momentum=0.9)
    for k in range(401):
        if k % 50 == 0:
            assert off(freeze(problem, optimizer, step=k), dense(problem)) < 0.02
        take(optimizer, problem())
    assert float(problem()) < 1e-3


# Tensors that are 0, or of another size ------------------------------------------------------------------------------


class LoRA(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("weight", random(6, 6, seed=4))
        self.A, self.B = nn.Parameter(0.4 * random(2, 6, seed=5)), nn.Parameter(scale * random(6, 2, seed=6))

    def forward(self, x):
        return x @ (self.weight + self.B @ self.A).T


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0])
def test_lora_begins_at_zero(scale, dtype):
    net = nn.Sequential(LoRA(scale), nn.Tanh(), LoRA(scale))
    problem = Regression(net, random(16, 6, seed=1), random(16, 6, seed=2)).to(dtype)
    assert off(freeze(problem), dense(problem)) < ACCURACY[dtype]


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("zero", ["all", "biases", "head", "all but one bias"])
def test_tensors_that_are_zero(zero, dtype):
    problem = NETWORKS["tanh"]()
    with torch.no_grad():
        for name, p in problem.named_parameters():
            chosen = {"all": True, "biases": p.ndim == 1, "head": "4" in name, "all but one bias": name != "net.0.bias"}
            p *= not chosen[zero]
    problem = problem.to(dtype)
    assert off(freeze(problem), dense(problem)) < ACCURACY[dtype]


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e6])
def test_a_tensor_of_another_size(scale):
    """An output bias of 1e6 is no reason to move the other layers by thousands; nor does a tiny one hold them back."""
    problem = NETWORKS["tanh"]()
    with torch.no_grad():
        problem.net[-1].bias.copy_(scale * random(2, seed=3))
        problem.y += problem.net[-1].bias
    problem = problem.float()
    assert off(freeze(problem), dense(problem)) < 0.01


def test_the_last_bits_of_a_sum_are_no_curvature():
    """What is added to the outputs swallows their change: the gradient moves in steps, or not at all."""

    class Swallowed(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1e6

    problem = Regression(seeded(Swallowed(4, 1)), random(16, 4, seed=1), random(16, 1, seed=2) + 1e6).float()
    assert off(freeze(problem), dense(problem)) < 0.01


def test_lengths_scale_and_zeros_borrow():
    tensors = [random(8, 4), torch.zeros(8), random(3, 8), torch.zeros(2, 3)]
    own = lengths(tensors)
    assert own[1] == own[3] == pytest.approx(0.1 * sorted([own[0], own[2]])[0])
    assert lengths([1e30 * t for t in tensors]) == pytest.approx([1e30 * x for x in own])
    assert lengths([t * 0 for t in tensors]) is None


# Price --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_on_ordinary_networks_a_product_is_one_gradient(name, monkeypatch):
    problem, count = NETWORKS[name]().float(), []
    original = Differences.difference
    monkeypatch.setattr(Differences, "difference", lambda self, *a: count.append(a) or original(self, *a))
    optimizer = SGD(problem.parameters(), 0.05, momentum=0.9)
    for k in range(41):
        if k % 10 == 0:
            snapshot, size = freeze(problem, step=k), len(count)
            hessian(snapshot)
            for v in random(10, sum(p.numel() for p in problem.parameters())).float():
                hessian(snapshot) @ v
            assert path_taken(snapshot, "auto") == "finite difference" and len(count) - size <= 12
        take(optimizer, problem())


# What optimizers make of rounding -----------------------------------------------------------------------------------


def test_adam_divides_rounding_by_rounding():
    """The biases of attention's keys have no gradient but rounding: differences of it would be most of the update."""
    problem = Classes(seeded(Attention()), random(12, 12, seed=1), None).float()
    optimizer = torch.optim.AdamW(problem.parameters(), 1e-3)
    for _ in range(20):
        take(optimizer, problem())
    n, twin = sum(p.numel() for p in problem.parameters()), copy.deepcopy(problem).double()
    other, state = torch.optim.AdamW(twin.parameters(), 1e-3), copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values.update({key: values[key].double() for key in ("exp_avg", "exp_avg_sq")})
    other.load_state_dict(state)
    z = torch.cat([random(n), torch.zeros(2 * n, dtype=f64)])
    truth = (step_jacobian(freeze(twin, other, gradient=None), method="exact") @ z)[:n] - z[:n]
    found = (step_jacobian(freeze(problem, optimizer)) @ z.float())[:n].double() - z[:n]
    assert float((found - truth).norm() / z.norm()) < 2e-4


class Kept(torch.optim.Optimizer):
    """Divides by the root of what it has seen, with next to no epsilon: smooth only very near."""

    def __init__(self, params, eps):
        super().__init__(params, {"lr": 0.1, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                seen = self.state[p].setdefault("seen", torch.zeros_like(p))
                seen.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                p.sub_(group["lr"] * p.grad / (seen.sqrt() + group["eps"]))


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_a_root_near_zero_is_approached(eps):
    """A number whose gradient is 0: the step is ``lr g / eps`` there, and a sign a little farther away."""
    theta = nn.Parameter(torch.tensor([1.0, 0.0], dtype=f64))
    problem = nn.Module()
    problem.theta = theta
    problem.forward = lambda: 0.5 * (theta * torch.tensor([1.0, 2.0], dtype=f64)).square().sum()
    optimizer = Kept([theta], eps)
    for _ in range(3):
        take(optimizer, problem())
    A = step_jacobian(freeze(problem, optimizer, replay=problem.forward), method="exact")
    z = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=f64)
    close((A @ z)[1] / (1 - 0.1 * 4 / eps), 1.0, 1e-3)


def test_nothing_is_not_a_scale():
    """Parameters and state that are 0: the generic step is differentiated where its first step goes."""
    for s in (1e-6, 1.0, 1e6):
        problem = Regression(nn.Linear(3, 1).double(), random(8, 3, seed=1), random(8, 1, seed=2))
        with torch.no_grad():
            for p in problem.parameters():
                p.zero_()
        problem = Units(problem, 1.0, s)
        optimizer = nadam(problem.parameters(), 1.0, s)
        take(optimizer, problem())
        n = 4
        A = step_jacobian(freeze(problem, optimizer), method="exact")
        assert bool(torch.isfinite(A @ torch.ones(A.shape[1], dtype=f64)).all())
        z = torch.zeros(A.shape[1], dtype=f64)
        z[:n] = random(n)
        moved = (A @ z)[:n]
        if s == 1e-6:
            first = moved
        close(moved / first.norm(), first / first.norm(), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_product_of_nothing_is_nothing(name):
    snapshot = freeze(NETWORKS[name]())
    operator = hessian(snapshot, method="finite difference")
    zero = torch.zeros(operator.shape[1], dtype=operator.dtype)
    assert torch.equal(operator @ zero, zero) and (operator @ torch.ones_like(zero)).norm() > 0


def test_a_run_remembers_how_far_its_differences_go():
    """A curvature that the first distance cannot resolve costs a second difference at the first step alone."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 2), 0.3 * torch.randn(16, 6), 10 * torch.randn(16, 2)
    v, run, counts, products = torch.randn(14), RunContext(), [], []
    for step, context in enumerate((run, run, RunContext())):
        calls = []
        replay = lambda calls=calls: calls.append(1) or F.mse_loss(net(x), y)  # noqa: E731
        gradient = torch.autograd.grad(replay(), [*net.parameters()])
        snapshot = Snapshot(
            step=step, module=net, replay=replay, loss=replay().detach(), run=context,
            gradient=dict(zip(("weight", "bias"), gradient)),
        )  # fmt: skip
        calls.clear()
        products.append(Differences(snapshot, snapshot.flat_gradient).product(v))
        counts.append(len(calls))
    assert counts == [2, 1, 2]
    assert torch.allclose(products[1], products[2], rtol=0.02, atol=0.01 * float(products[2].norm()))


def test_a_loss_that_was_rounded_does_not_drive_differences_far_away():
    """There the third derivative is the error: a network that has learned well has little curvature beside it."""
    problem, run = NETWORKS["tanh"]().float(), RunContext()
    truth, v = dense(problem), random(sum(p.numel() for p in problem.parameters())).float()
    snapshot, far = freeze(problem, step=10, run=run), []
    for rounding in (0.0, 1e-3):
        differences = Differences(snapshot, snapshot.flat_gradient)
        size, reach = differences._extent(v)
        seen = float((truth @ v.double()).norm()) / size
        run.known_scales.note(0, differences.key, Scale(seen, seen, float(snapshot.loss), rounding))
        differences = Differences(snapshot, snapshot.flat_gradient)
        original = differences.difference
        differences.difference = lambda *how, original=original: far.append(how[-1]) or original(*how)
        product = differences.product(v).double()
        assert float((product - truth @ v.double()).norm()) < 0.01 * seen * size
    assert max(far) <= 1.01 * max(far[0], BACK * reach)


def test_rounding_that_is_less_than_its_bound_is_seen():
    """Adam's rates are large where gradients, and their rounding, are small; the bound takes all for alike."""
    problem = Classes(seeded(Attention()), random(12, 12, seed=1), None).float()
    truth, n = dense(problem), sum(p.numel() for p in problem.parameters())
    snapshot, v = freeze(problem), random(n).float()
    gradient = snapshot.flat_gradient.abs()
    weight = (gradient + 1e-6).rsqrt()
    differences = Differences(snapshot, snapshot.flat_gradient, weight, both=True)
    product = differences.product(v)
    assert differences.safety < SAFETY / 2
    error = (product.double() - truth @ v.double()).abs()
    assert float((weight * error).norm()) < 0.01 * differences.used * float(v.norm())
    assert float(error.norm()) < 0.01 * differences.seen * float(v.norm())
