"""Backward functions of the user's own, whose second derivative may be wrong without a word."""

import pytest
import torch
from model_zoo import Custom, Detached, FusedCrossEntropy, Once, Twice
from problems import Regression, close, dense_hessian, f64, freeze, random, seeded
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import Monitor, ResidualCFL, Sharpness, Unmeasurable
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.operators import hessian
from lsp_callbacks.operators.curvature import exact_hessian
from lsp_callbacks.operators.curvature.hessian import path_taken
from lsp_callbacks.operators.curvature.second_derivative_check import hessian_agrees
from lsp_callbacks.operators.curvature.top_eigenvalue import top_eigenvalue
from lsp_callbacks.operators.sgd.output_hessian import output_hessian
from lsp_callbacks.step.criterion import Evaluation


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class Plain(nn.Module):
    def forward(self, x):
        q = x.view(1, 1, -1, 6)
        return F.scaled_dot_product_attention(q, q, q).view(x.shape)


def regression(middle, *after):
    """The sine of large arguments: its own curvature is a large part of the Hessian."""
    return Regression(
        seeded(nn.Sequential(nn.Linear(3, 6), middle, *after, nn.Linear(6, 2))),
        2 * random(8, 3),
        3 * random(8, 2, seed=1),
    )


class Classifier(Regression):
    def __init__(self, criterion):
        super().__init__(seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))), random(9, 3), None)
        self.criterion = criterion

    def forward(self):
        return self.criterion(self.net(self.x), torch.arange(9) % 3)


PROBLEMS = {  # what cannot be differentiated twice, and its honest twin
    "once": (lambda: regression(Custom(Once)), lambda: regression(Sine())),
    "detached": (lambda: regression(Custom(Detached)), lambda: regression(Sine())),
    "loss": (lambda: Classifier(FusedCrossEntropy.apply), lambda: Classifier(F.cross_entropy)),
}
#: No gradient: what takes exact products by itself.
BARE = {"gradient": None}


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_sharpness_is_wrong_without_the_comparison_and_right_with_it(name, method, monkeypatch):
    make, twin = PROBLEMS[name]
    true = torch.linalg.eigvalsh(dense_hessian(twin()))[-1]

    def measured():
        return float(top_eigenvalue(freeze(make(), **BARE), steps=40, tol=1e-8, method=method).value)

    assert abs(measured() / true - 1) < 0.01
    monkeypatch.setattr(exact_hessian, "hessian_agrees", lambda *_: True)
    assert abs(measured() / true - 1) > 0.2


class Tilted(nn.Module):
    """A steep slope without curvature: in single precision it drowns differences over small distances."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self):
        return self.problem() + 100 * sum(p.sum() for p in self.problem.parameters())


def test_rounding_excuses_nothing():
    true = torch.linalg.eigvalsh(dense_hessian(regression(Sine())))[-1]
    found = top_eigenvalue(freeze(Tilted(regression(Custom(Detached)).float()), **BARE), steps=40)
    close(found.value / true, 1.0, 0.02)


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_are_the_dense_ones_in_single_precision_too(name):
    make, twin = PROBLEMS[name]
    H = dense_hessian(twin())
    for problem, tol in ((make(), 1e-6), (make().float(), 1e-2)):
        snapshot = freeze(problem, **BARE)
        found = hessian(snapshot).dense()
        assert torch.linalg.matrix_norm(found.double() - H, 2) < tol * torch.linalg.matrix_norm(H, 2)
        assert path_taken(snapshot, "auto") == "finite difference"


@pytest.mark.parametrize(
    "make, settings, path",
    [
        (lambda: regression(Sine()), {}, "finite difference"),
        (lambda: regression(Sine()), BARE, "exact"),
        (lambda: regression(Custom(Twice)), BARE, "exact"),
        (lambda: regression(Custom(Once)), BARE, "finite difference"),
        (lambda: regression(Custom(Twice), nn.ReLU()), {}, "exact"),
        (lambda: regression(Plain(), nn.ReLU()), {}, "finite difference, slopes held"),
        (lambda: regression(Plain(), nn.ReLU()), BARE, "exact, math attention"),
        (lambda: regression(Sine()).bfloat16(), {}, "exact, bfloat16"),
    ],
    ids=range(8),
)
def test_the_path_is_told_and_forgotten_when_a_measurement_fails(make, settings, path):
    problem, monitor = make(), Monitor(Sharpness(), every_n_steps=1)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.1)
    monitor.observe(freeze(problem, optimizer, **settings))
    assert monitor.paths == {"sharpness": path}
    with pytest.warns(UserWarning, match="could not be replayed"):
        monitor.observe(freeze(problem, optimizer, step=1, loss=torch.tensor(7.0)))
    assert monitor.paths == {}


@pytest.mark.parametrize("function", [Once, Detached])
def test_across_kinks_nobody_can_tell(function):
    problem = regression(Custom(function), nn.ReLU())
    with pytest.raises(Unmeasurable, match=f"backward of {function.__name__}.*kinks"):
        hessian(freeze(problem))
    monitor = Monitor(Sharpness(), every_n_steps=1)
    with pytest.warns(UserWarning, match="backward of"):
        observation = monitor.observe(freeze(problem, torch.optim.SGD(problem.parameters(), lr=0.1)))
    assert set(observation.failures) == {"sharpness"} and monitor.paths == {}


@pytest.mark.parametrize("seed", range(3))
def test_what_can_be_differentiated_twice_is_not_refused_across_kinks(seed):
    def make(middle):
        net = nn.Sequential(nn.Linear(3, 12), middle, nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))
        return Regression(seeded(net, seed), random(64, 3, seed=seed), random(64, 2))

    true = torch.linalg.eigvalsh(dense_hessian(make(Sine())))[-1]
    close(top_eigenvalue(freeze(make(Custom(Twice)).float()), steps=40, tol=1e-4).value, true, 1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("lost", [-0.02, 0.0, 0.02])
def test_two_per_cent_that_a_product_lacks_are_not_taken_for_rounding(activation, lost):
    """At each distance they are the same: only what changes with it is a kink, and nearer ones are rounded more.

    No kink lies within the first distance; behind one, 2 % may be the rounding of nearer ones.
    """
    for seed in range(5):

        def make(seed=seed):
            net = nn.Sequential(nn.Linear(3, 12), Sine(), nn.Linear(12, 12), activation(), nn.Linear(12, 2))
            return Regression(seeded(net, seed), random(64, 3, seed=seed), random(64, 2))

        H = dense_hessian(make()).float()
        snapshot = freeze(make().float())
        right = hessian_agrees(lambda v, H=H: (1 - lost) * (H @ v), snapshot.flat_gradient, snapshot)
        assert right == (lost == 0), seed


def test_a_kink_between_two_far_points_is_stepped_around():
    """Over the first distance 6 of these 10 products differ from their differences."""
    for seed in range(10):
        net = nn.Sequential(nn.Linear(3, 48), Custom(Twice), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2))
        problem = Regression(seeded(net, seed), random(64, 3, seed=seed), random(64, 2)).float()
        snapshot = freeze(problem)
        hessian(snapshot)
        assert path_taken(snapshot, "auto") == "exact"


class Straight(torch.autograd.Function):
    """A straight-through estimator: its gradient is not that of the loss."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_gradient_that_is_not_the_loss_s_is_refused():
    problem = regression(Sine(), Custom(Straight))
    with pytest.raises(Unmeasurable, match="not that of a smooth function"):
        top_eigenvalue(freeze(problem))


def test_in_half_precision_nobody_can_tell():
    with pytest.raises(Unmeasurable, match=r"Twice.*half precision"):
        hessian(freeze(regression(Custom(Twice)).bfloat16()))


class NoSecond(nn.Module):
    """A kernel of PyTorch's own without a second derivative, called past the choice of kernels."""

    def forward(self, x):
        q = x.view(1, 1, -1, 6)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].view(x.shape)


def test_what_raises_when_differentiated_twice_goes_another_way():
    problem, twin = (regression(Sine(), middle) for middle in (NoSecond(), Plain()))
    snapshot = freeze(problem, **BARE)
    H = dense_hessian(twin)
    close(hessian(snapshot).dense(), H, 1e-5 * torch.linalg.matrix_norm(H, 2))
    assert path_taken(snapshot, "auto") == "finite difference"
    with pytest.raises(Unmeasurable, match="cannot be differentiated twice"):
        top_eigenvalue(freeze(regression(nn.ReLU(), NoSecond()), **BARE))
    behind, true = freeze(regression(nn.ReLU(), NoSecond())), dense_hessian(regression(nn.ReLU(), Plain()))
    close(hessian(behind).dense(), true, 1e-5 * torch.linalg.matrix_norm(true, 2))  # slopes are held


def test_the_graph_names_what_it_holds():
    x = random(2, 4).requires_grad_()
    assert read(Custom(Twice)(x).sum()).custom == ("Twice",)
    assert read(x.relu().sum()).kinked and not read(x.tanh().sum()).kinked
    assert read(Plain()(random(2, 6).requires_grad_()).sum()).fused and not read(x.sum()).fused
    assert read(x.sum()).dtype == f64 and read(x.bfloat16().float().sum()).dtype == torch.bfloat16
    checkpointed = torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)
    assert read(checkpointed.sum()).custom == ()


class BranchBlock(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 6), Custom(function))

    def forward(self, x):
        return x + self.branch(x)


def test_residual_blocks_with_such_functions_are_refused():
    def measured(middle):
        metric = ResidualCFL()
        snapshot = freeze(regression(Sine(), middle), captures_inputs=metric.captures_inputs)
        metric.update(snapshot)
        return float(metric.compute()["stability/residual_stiffness_max"])

    twin = BranchBlock(Twice)
    twin.branch[1] = Sine()
    for function in (Twice, Detached):  # the derivative in the cotangent is all that a Jacobian needs
        close(measured(BranchBlock(function)), measured(twin), 1e-9)
    with pytest.raises(Unmeasurable, match=r"backward of Once in block 'net.2'"):
        measured(BranchBlock(Once))


class HalfDetached(Twice):
    """The log-partition of a softmax: half of the curvature is lost."""

    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f.logsumexp(-1).mean()

    @staticmethod
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        p = f.softmax(-1)
        return g * (0.5 * p + 0.5 * p.detach()) / len(f)


def test_a_criterion_of_the_user_s_own_is_compared_too():
    with pytest.raises(Unmeasurable, match="backward of HalfDetached"):
        output_hessian(Evaluation(random(4, 1, 3), lambda f: HalfDetached.apply(f[:, 0])))
    f = random(4, 1, 3)
    p = f.softmax(-1)
    product = output_hessian(Evaluation(f, lambda f: Whole.apply(f[:, 0])))
    v = random(4, 1, 3, seed=3)
    close(product(v), p * v - p * (p * v).sum(-1, keepdim=True), 1e-12)


class Whole(HalfDetached):
    @staticmethod
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        return g * f.softmax(-1) / len(f)
