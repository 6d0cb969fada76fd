"""Condition numbers and Lipschitz bounds, against dense matrices, and against brute force over inputs."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from problems import (
    CONVOLUTION_NORM,
    FEEDFORWARD,
    KERNEL,
    Regression,
    close,
    f64,
    freeze,
    matrix,
    random,
    seeded,
    symmetric,
)
from torch import nn
from torch.nn.utils import parametrizations

from lsp_callbacks import SignalPropagation
from lsp_callbacks.functional import condition, condition_lower, layer_lipschitz, lipschitz_lower, loss_condition_lower
from lsp_callbacks.functional.network import lipschitz as module_lipschitz
from lsp_callbacks.functional.network.layer_operators import weight_operators
from lsp_callbacks.functional.network.lipschitz import certified_norm
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.operators.network.lipschitz import Uncertified, lipschitz_upper

norm2 = torch.linalg.matrix_norm


class Task(nn.Module):
    """A mean square of a network's outputs."""

    def __init__(self, net, *shape):
        super().__init__()
        self.net = net
        self.register_buffer("x", random(*shape))

    def forward(self):
        return self.net(self.x).square().mean()


def states(net, *shape):
    return depth(freeze(Task(net.double(), *shape)))


def linear(W, bias=False):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias).double()
    layer.weight.data = W
    return layer


class Hides(nn.Module):
    """A branch that depends on the input, and whose graph does not."""

    def __init__(self, branch):
        super().__init__()
        self.first, self.last, self.branch = nn.Linear(4, 4), nn.Linear(4, 2), branch

    def forward(self, x):
        return self.last(self.branch(self.first(x)))


def without_graph(h):
    with torch.no_grad():
        scale = 100 * h.square().mean(-1, keepdim=True)
    return h + scale


def filled(h):
    other = torch.zeros_like(h)
    other[:, 0] = 100 * h.detach()[:, 1]
    return h + other


def views(write):
    """A buffer that is written through a view of it, by ``write(buffer, what depends on the input)``."""

    def branch(h):
        other = torch.zeros_like(h)
        write(other, 100 * h.detach())
        return h + other

    return branch


def through_a_view(g, h):
    view = g[:, :2]
    view += h[:, 1:3]


def older_view(h):
    other = torch.zeros_like(h)
    older = other.t()
    other[:, :2].copy_(100 * h.detach()[:, :2])
    return h + older.t()


def written(h):
    """Into what has a graph, of weights, which knows nothing of the input."""
    other = torch.zeros_like(h).requires_grad_().clone()
    other[:, 0].copy_(100 * h.detach()[:, 1])
    return h + other


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1 + 100 * x.detach().abs()) + 1


HIDDEN = {
    "factor": lambda h: h * (100 * h.detach().abs()),
    "sum": lambda h: h + 100 * h.detach(),
    "data": lambda h: h + 100 * h.data,
    "no_grad": without_graph,
    "in place": filled,
    "rows": views(lambda g, h: g[: len(h)].copy_(h)),
    "column": views(lambda g, h: g[:, 0].copy_(h[:, 1])),
    "view": views(through_a_view),
    "view of a view": views(lambda g, h: g[1:][:, 1:].add_(h[1:, 1:])),
    "item of a view": views(lambda g, h: g[1:].__setitem__(0, h[0])),
    "out": views(lambda g, h: torch.add(h[:, :2], 1.0, out=g[:, 1:3])),
    "older view": older_view,
    "new_tensor": lambda h: h + torch.ones(1, dtype=f64).new_tensor(100 * h.detach()),
    "full_like": lambda h: h + torch.full_like(h, 100 * h.detach().max()),
    "to": lambda h: h + (100 * h.detach()).float().to(torch.ones(1, dtype=f64)),
    "constant with a graph": written,
    "mask": lambda h: 100 * h + 100 * (h > 0).double(),
    "words": lambda h: h + F.embedding(h.argmax(-1), 100 * torch.eye(4, dtype=f64)),
    "number": lambda h: h * float(100 * h.max()),
    "if": lambda h: 100 * h if h[0, 0] > 0 else h,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_depends_on_the_input_without_a_graph_has_no_bound(name):
    with pytest.raises(Uncertified, match="number" if name in ("number", "if") else "without its graph"):
        lipschitz_upper(states(seeded(Hides(HIDDEN[name])), 5, 4))


def test_a_layer_of_ones_own_that_hides_is_no_layer_of_torch():
    with pytest.raises(Uncertified):
        lipschitz_upper(states(seeded(Hides(OwnLinear(4, 4))), 5, 4))


class Twice(nn.Module):
    """A step that gives its input to two layers, and their sum to a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.register_buffer("x", random(5, 4))

    def forward(self):
        return self.c(self.a(self.x) + self.b(self.x)).square().mean()


def test_an_input_of_two_layers_is_one():
    task = seeded(Twice())
    A, B, C = (norm2(layer.weight.detach(), 2) for layer in (task.a, task.b, task.c))
    close(lipschitz_upper(depth(freeze(task))), (A + B) * C, 1e-9)


ONES = torch.ones(4)
CONSTANTS = {
    "weights": lambda h: h * torch.ones(4, dtype=f64).requires_grad_().detach(),
    "shapes": lambda h: h * torch.full_like(h, 2.0) + h.new_ones(4) + torch.zeros(h.shape, dtype=f64),
}


LOOKS = {
    "to": lambda one, h: one.to(h),
    "type_as": lambda one, h: one.type_as(h),
    "expand_as": lambda one, h: one.double().expand_as(h),
    "view_as": lambda one, h: one.double().repeat(5).view_as(h),
    "reshape_as": lambda one, h: one.double().repeat(5).reshape_as(h),
}
CONSTANTS |= {name: lambda h, look=look: h + look(ONES, h.detach()) for name, look in LOOKS.items()}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_only_looks_like_it_keeps_its_bound(name):
    net = seeded(Hides(CONSTANTS[name]))
    product = norm2(net.first.weight.detach(), 2) * norm2(net.last.weight.detach(), 2)
    close(lipschitz_upper(states(net, 5, 4)), product * (2 if name == "shapes" else 1), 1e-9)


def test_what_is_read_at_the_end_changes_nothing_before():
    net = seeded(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), Last()))
    close(lipschitz_upper(states(net, 5, 4)), norm2(net[0].weight, 2) * norm2(net[1].weight, 2), 1e-9)


class Last(nn.Module):
    def forward(self, h):
        assert h.isfinite().all() and h.sum().item() < 1e9
        return h


# Condition numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, n", [(5, 5), (3, 8), (8, 3)])
def test_condition_is_that_of_the_dense_matrix(m, n):
    A = random(m, n)
    value, rank = condition(from_matrix(A))
    close(value, torch.linalg.cond(A), 1e-9)
    assert rank == min(m, n)
    lower = condition_lower(from_matrix(A), steps=3)
    close(lower, value, 1e-6) if min(m, n) == 3 else None
    assert 1 <= condition_lower(from_matrix(A), steps=2) <= value * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_that_are_rounding_errors_do_not_count(dtype):
    U, V = (torch.linalg.qr(random(6, 3, seed=i))[0] for i in range(2))
    A = (U @ torch.diag(torch.tensor([8.0, 4.0, 2.0], dtype=f64)) @ V.T).to(dtype)
    value, rank = condition(from_matrix(A))
    close(value, 4.0, 1e-5)
    assert rank == 3
    close(condition_lower(from_matrix(A), steps=6), 4.0, 1e-4)
    for steps in (2, 3, 4, 5):  # nothing outside of the range gets in
        assert condition_lower(from_matrix(A), steps=steps) <= 4 * (1 + 1e-3)


def test_degenerate_matrices_have_no_condition():
    for bad in (torch.zeros(3, 2), torch.full((2, 2), math.nan)):
        assert condition(from_matrix(bad))[0].isnan() and condition_lower(from_matrix(bad)).isnan()
    close(condition(from_matrix(torch.eye(4)))[0], 1.0, 0)
    close(condition_lower(from_matrix(torch.eye(4))), 1.0, 1e-6)


def test_layers_as_they_are_applied(monkeypatch):
    convolution = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    net = seeded(nn.Sequential(convolution, nn.Flatten(), parametrizations.weight_norm(nn.Linear(27, 4)), nn.Tanh()))
    task = Regression(net, random(8, 2, 5, 5), torch.zeros(8, 4, dtype=f64))
    metric = SignalPropagation()
    before = {name: b.clone() for name, b in task.named_buffers()}
    metric.update(freeze(task))
    A = weight_operators(convolution, (2, 5, 5))[""].dense()
    values = metric.compute()
    close(values["stability/condition/net.0"], torch.linalg.cond(A), 1e-9)
    close(values["stability/condition/net.2"], torch.linalg.cond(net[2].weight.detach()), 1e-9)
    close(values["stability/condition_max"], max(torch.linalg.cond(A), torch.linalg.cond(net[2].weight.detach())), 1e-9)
    assert all(torch.equal(b, before[name]) for name, b in task.named_buffers())
    monkeypatch.setattr("lsp_callbacks.quantities.network.signal_parts.SMALL", 10)
    metric.update(freeze(task))
    values = metric.compute()
    assert 1 < values["stability/condition_lower/net.0"] <= torch.linalg.cond(A)
    assert "stability/condition/net.0" not in values and "stability/condition/net.2" in values


SPECTRUM = [9.0, 5.0, 2.0, 0.5, 0.1, 0.0]


def test_the_condition_of_a_quadratic_loss_is_bounded_from_below():
    H = symmetric(SPECTRUM)
    for seed in range(20):
        theta = random(6, seed=seed)
        found = loss_condition_lower(from_matrix(H), H @ theta)
        g = H @ theta
        close(found, 9.0 * (g @ g) / (g @ H @ g), 1e-3)
        assert found <= 90 * (1 + 1e-9)  # 9 / 0.1, the smallest nonzero eigenvalue
    _, vectors = torch.linalg.eigh(H)
    close(loss_condition_lower(from_matrix(H), vectors[:, 1] + 1e-4 * vectors[:, 5]), 90, 1e-3)  # it is attained


def test_negative_curvature_has_no_condition():
    H = symmetric([3.0, 1.0, -2.0])
    _, vectors = torch.linalg.eigh(H)
    assert loss_condition_lower(from_matrix(H), vectors[:, 0]) is None
    assert loss_condition_lower(from_matrix(H), torch.zeros(3, dtype=f64)) is None
    assert loss_condition_lower(from_matrix(H), torch.full((3,), math.nan, dtype=f64)) is None


def test_the_condition_of_a_step_is_that_of_its_hessian():
    task = Regression(linear(random(2, 3)), random(9, 3, seed=1), random(9, 2, seed=2))
    metric = SignalPropagation()
    metric.update(freeze(task))
    C = task.x.T @ task.x / 9
    g = torch.autograd.grad(task(), task.net.weight)[0]
    expected = torch.linalg.eigvalsh(C)[-1] * g.square().sum() / (g @ C * g).sum()
    close(metric.compute()["stability/loss_condition_lower"], expected, 1e-3)


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_linear_networks_have_their_exact_norm_from_below_and_the_product_from_above(name):
    case = FEEDFORWARD[name]
    found = states(nn.Sequential(*map(linear, case.layers)), 3, 2)
    depth_ = len(case.layers)
    close(lipschitz_lower(found.jacobian(len(found.layers))), math.exp(depth_ * case.actual), 1e-6)
    close(lipschitz_upper(found), math.exp(depth_ * case.bound), 1e-12)


class Residual(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.a, self.b = nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x):
        return x + 0.5 * self.b(torch.tanh(self.a(x)))


class Functions(nn.Module):
    """Everything that is no module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 1.0, 1.0, 1.0, 3.0]))

    def forward(self, x):
        left, right = F.leaky_relu(self.a(x), -1.5), F.elu(self.b(x), 1.7)
        y = torch.cat([(self.scale * left)[:, :3], (right / 0.25)[:, 3:]], 1) - 2 * left
        return self.last(y + y.sum(1, keepdim=True) + y.mean(1, keepdim=True))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 2, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 3, 1)
        return self.last(F.avg_pool2d(F.gelu(self.b(x)), 2, 1).flatten(1))


NETS = {
    "chain": (lambda: nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Dropout(0.5), nn.Linear(6, 3)), (4,)),
    "norms": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(True), nn.Linear(6, 3)), (4,)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, eps=0.3), nn.Linear(6, 3)), (4,)),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6, eps=0.3), nn.Linear(6, 3)), (4,)),
    "group_norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6, eps=0.3), nn.Linear(6, 3)), (4,)),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 3)), (4,)),
    "residual": (lambda: nn.Sequential(nn.Linear(4, 4), Residual(), nn.Tanh(), Residual(), nn.Linear(4, 3)), (4,)),
    "functions": (Functions, (4,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(2, 3, 2),
            nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(3, 3),
        ),
        (1, 8, 8),
    ),
    "global_pooling": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
        (1, 5, 5),
    ),
    "pooled_functions": (Pooled, (1, 8, 8)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(1, 2, 3, 2), nn.Flatten(), nn.Linear(18, 3)), (1, 4)),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)), (4,)),
}  # fmt: skip


def steepest(net, shape, seed):
    """Ascent of ``||J(x)||`` over x, by brute force from one start."""
    x = (3 * random(1, *shape, seed=seed)).requires_grad_()
    best = 0.0
    for _ in range(25):
        J = torch.autograd.functional.jacobian(net, x, create_graph=True).flatten(2 if len(shape) == 1 else 0)
        norm = norm2(J.reshape(3, -1), 2)
        best = max(best, float(norm.detach()))
        (g,) = torch.autograd.grad(norm, x, allow_unused=True)
        if g is None or not bool(g.any()):  # piecewise linear
            x = (3 * random(1, *shape, seed=seed + 1000 * (1 + int(norm * 1e6) % 7))).requires_grad_()
        else:
            x = (x + 0.3 * g / g.norm()).detach().requires_grad_()
    return best


@pytest.mark.parametrize("name", NETS)
def test_no_input_beats_the_upper_bound_and_the_samples_attain_the_lower(name):
    make, shape = NETS[name]
    net = seeded(make())
    found = states(net, 5, *shape)
    lower, upper = float(lipschitz_lower(found.jacobian(len(found.layers)), steps=20)), lipschitz_upper(found)
    net.eval()
    jacobians = [torch.autograd.functional.jacobian(net, x[None]).reshape(3, -1) for x in random(5, *shape)]
    close(lower, max(norm2(J, 2) for J in jacobians), 1e-6)
    best = max(steepest(net, shape, seed) for seed in range(3))
    assert lower <= upper and best <= upper * (1 + 1e-9)
    assert upper < 60 * best  # of these shallow networks


def far(module, shape, seed):
    """The largest secant slope of a module found among many pairs of near inputs, some of them nearly constant."""
    x = random(200, *shape, seed=seed) * torch.logspace(-3, 1, 200, dtype=f64).reshape(-1, *(1 for _ in shape))
    d = 1e-6 * random(200, *shape, seed=seed + 1)
    moved = (module(x + d) - module(x)).flatten(1).norm(dim=1)
    return float((moved / d.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize(
    "module, shape, attained",
    [
        (nn.LayerNorm(6, eps=0.2), (6,), 0.3), (nn.RMSNorm(6, eps=0.2), (6,), 0.3), (nn.RMSNorm(6), (6,), 0.0),
        (nn.GroupNorm(2, 4, eps=0.2), (4, 3), 0.3), (nn.Softmax(-1), (4,), 0.2), (nn.BatchNorm1d(5).eval(), (5,), 0.5),
        (nn.MaxPool1d(3, 1), (2, 9), 0.4), (nn.AvgPool2d(3, 2), (1, 9, 9), 0.2), (nn.MaxPool2d((2, 3)), (1, 6, 6), 0.4),
        (nn.AvgPool1d(2), (2, 8), 0.4), (nn.Flatten(), (2, 3), 0.9), (nn.Conv1d(2, 3, 3), (2, 7), 0.3),
    ],
    ids=repr,
)  # fmt: skip
def test_modules_stay_below_their_constants(module, shape, attained):
    module = seeded(module)
    constant = layer_lipschitz(module, (1, *shape))
    found = max(far(module, shape, seed) for seed in range(3))
    assert attained * constant <= found <= constant * (1 + 1e-6)


@pytest.mark.parametrize("mode, stride", CONVOLUTION_NORM)
def test_the_bound_of_a_convolution_is_the_true_norm_not_that_of_its_reshaped_kernel(mode, stride):
    layer = nn.Conv2d(1, 1, 3, padding=1, stride=stride, padding_mode=mode, bias=False).double()
    layer.weight.data[0, 0] = KERNEL
    close(layer_lipschitz(layer, (1, 8, 8)), CONVOLUTION_NORM[mode, stride], 1e-9)


def test_large_layers_are_bounded_from_above_by_a_few_per_cent(monkeypatch):
    for seed in range(5):
        A = random(60, 80, seed=seed)
        exact = float(norm2(A, 2))
        close(certified_norm(from_matrix(A)), exact, 1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(module_lipschitz, "SMALL", 10)
            assert exact <= certified_norm(from_matrix(A)) <= 1.04 * exact
            assert exact <= certified_norm(from_matrix(A), steps=8) <= 2 * exact  # not converged, and a bound still
            assert exact <= certified_norm(from_matrix(A), steps=3) <= 5 * exact


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.sigmoid(self.a(x)).sum(1, keepdim=True) * x)


class Reciprocal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(1 / (1 + x.square()))


class Bypass(nn.Module):
    """A module that holds on to the input by another way than its argument."""

    def __init__(self):
        super().__init__()
        self.a, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.Tanh()
        self.act.register_forward_hook(lambda module, args, output: output + 10 * self.x)

    def forward(self, x):
        self.x = x
        return self.last(self.act(self.a(x)))


@pytest.mark.parametrize(
    "make", [Gate, Reciprocal, lambda: nn.Sequential(nn.Linear(4, 3), nn.Hardshrink(), nn.Linear(3, 3))]
)
def test_what_has_no_constant_is_not_certified(make):
    found = states(seeded(make()), 5, 4)
    with pytest.raises(Uncertified, match="Backward"):
        lipschitz_upper(found)
    assert lipschitz_lower(found.jacobian(len(found.layers))) > 0


def test_attention_is_not_certified_and_says_so():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    task = Task(seeded(nn.Sequential(layer, nn.Linear(4, 2))), 5, 3, 4)
    metric = SignalPropagation()
    metric.update(freeze(task))
    assert "Lipschitz" in metric.absent["lipschitz_upper"]
    values = metric.compute()
    assert "stability/lipschitz_upper" not in values and values["stability/lipschitz_lower"] > 0


def test_a_module_that_knows_the_input_by_another_way_is_not_taken_for_itself():
    net = seeded(Bypass())
    found = states(net, 5, 4)
    assert lipschitz_upper(found) >= lipschitz_lower(found.jacobian(len(found.layers)))
    assert lipschitz_upper(found) > 9 * norm2(net.last.weight.detach(), 2)


def test_scales_of_a_network_scale_its_bounds():
    W = matrix([[3.0, 0.0], [0.0, 1.0]])
    for a, b in itertools.product((1.0, 2.0), (1.0, 0.5)):
        found = states(nn.Sequential(linear(a * W, True), nn.Identity(), linear(b * W, True)), 3, 2)
        close(lipschitz_upper(found), 9 * a * b, 1e-12)
        close(lipschitz_lower(found.jacobian(len(found.layers))), 9 * a * b, 1e-6)


class Tight(nn.Module):
    """Two layers with ones for weights around a function: the bound is attained."""

    def __init__(self, function, width=1):
        super().__init__()
        self.first, self.last = (linear(torch.ones(1, n, dtype=f64)) for n in (1, width))
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    "function, width, expected",
    [
        (lambda y: y + torch.zeros(6, dtype=f64), 6, 6.0), (lambda y: y * torch.ones(6, dtype=f64), 6, 6.0),
        (lambda y: y.expand(-1, 6), 6, 6.0), (lambda y: F.elu(y, 1.7), 1, 1.7), (F.selu, 1, 1.7580993408473766),
        (lambda y: F.leaky_relu(y, -1.5), 1, 1.5), (lambda y: y - 2 * y, 1, 3.0), (lambda y: -4 * y / 0.5, 1, 8.0),
    ],
)  # fmt: skip
def test_functions_that_enlarge_are_counted(function, width, expected):
    net = Tight(function, width)
    task = Task(net, 4, 1)
    task.x = -1e-9 * task.x.abs()
    found = depth(freeze(task))
    close(lipschitz_upper(found), expected, 1e-12)
    true = 1.0 if expected == 3.0 else expected  # branches are summed as if they never cancelled
    close(lipschitz_lower(found.jacobian(len(found.layers))), true, 1e-6)
