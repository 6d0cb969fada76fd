import math

import pytest
import torch
from problems import (
    MOMENTUM_EDGES,
    Quadratic,
    Regression,
    chebyshev,
    close,
    dense_hessian,
    f64,
    freeze,
    interpolating_tanh,
    random,
    regression,
    seeded,
    symmetric,
    take,
)
from scipy.sparse.linalg import LinearOperator as SciPyOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from lsp_callbacks import Sharpness, Snapshot, Unmeasurable
from lsp_callbacks.functional import stability_constant
from lsp_callbacks.operators import hessian, step_jacobian
from lsp_callbacks.operators.curvature.hessian import path_taken
from lsp_callbacks.operators.curvature.stability_threshold import stability_threshold
from lsp_callbacks.operators.curvature.top_eigenvalue import top_eigenvalue
from lsp_callbacks.step.flat import displaced, flatten

SGD = torch.optim.SGD
METHODS = ["exact", "finite_difference"]


class Attention(nn.Module):
    """One pre-norm transformer layer on sequences of 3; the mean over time is read out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        return self.layer(x.view(-1, 3, 4)).mean(1)


def networks() -> dict[str, Regression]:
    x, y = random(5, 12, seed=1), random(5, 4, seed=2)
    convolution = nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(12, 4)
    )
    norms = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4))
    return {
        "tanh": regression(),
        "convolution": Regression(seeded(convolution), x, y),
        "norms": Regression(seeded(norms), x, y),
        "attention": Regression(seeded(Attention()), x, y),
    }


# The operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks())
def test_hessian_is_the_dense_one(name):
    problem = networks()[name]
    H = dense_hessian(problem)
    size = torch.linalg.matrix_norm(H, 2)
    close(hessian(freeze(problem), method="exact").dense(), H, 1e-11 * size)
    # The step is 8.7 sqrt(eps) = 1.3e-7 along a unit vector: an error of 0.5 e |third derivative|.
    close(hessian(freeze(problem), method="finite_difference").dense(), H, 2e-6 * size)
    parameters = list(problem.parameters())

    def gradient(e: Tensor, distance: float) -> Tensor:
        with displaced(parameters, e, distance):
            return flatten(torch.autograd.grad(problem(), parameters), parameters)

    columns = torch.eye(len(H), dtype=f64)[:: len(H) // 8]
    near, far = (torch.stack([gradient(e, d) - gradient(e, -d) for e in columns]) for d in (1e-3, 2e-3))
    close((8 * near - far) / 12e-3, H[:: len(H) // 8], 1e-8 * size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3])
def test_products_are_linear_in_the_vector(method, scale):
    problem, v = regression(), random(21)
    snapshot = freeze(problem)
    H = hessian(snapshot, method=method)
    close((H @ (scale * v)) / (scale or 1.0), dense_hessian(problem) @ v * bool(scale), 1e-5)
    path = "finite difference" if method == "finite_difference" else "exact"
    assert path_taken(snapshot, method) == path  # a smooth loss needs no second look


def test_finite_differences_in_single_precision():
    problem = regression()
    H = dense_hessian(problem)
    found = hessian(freeze(problem.float())).dense().double()
    assert torch.linalg.matrix_norm(found - H, 2) < 5e-3 * torch.linalg.matrix_norm(H, 2)


def test_auto_takes_differences_only_where_they_can_be_trusted():
    problem = regression()
    with_gradient = freeze(problem)
    assert hessian(with_gradient) is hessian(with_gradient, method="finite_difference")
    without = freeze(problem, gradient=None)
    assert hessian(without) is hessian(without, method="exact")
    with pytest.raises(Unmeasurable, match="gradient"):
        hessian(without, method="finite_difference")
    mixed = freeze(problem.bfloat16())
    assert hessian(mixed) is hessian(mixed, method="exact")


@pytest.mark.parametrize("method", METHODS)
def test_only_trainable_parameters_count(method):
    problem = regression()
    problem.net[0].weight.requires_grad_(False)
    H = dense_hessian(problem)
    found = hessian(freeze(problem), method=method)
    assert found.shape == (13, 13)
    close(found.dense(), H, 1e-5)


def test_nothing_to_differentiate_is_refused():
    problem = regression().requires_grad_(False)
    with pytest.raises(Unmeasurable, match="requires a gradient"):
        hessian(Snapshot(step=0, module=problem, replay=problem))


@pytest.mark.parametrize("method", METHODS)
def test_a_replay_that_gives_another_loss_is_refused(method):
    problem = regression()
    v = random(21)
    with pytest.raises(Unmeasurable, match="could not be replayed"):
        hessian(freeze(problem, replay=lambda: problem() * torch.rand(())), method=method) @ v
    with pytest.raises(Unmeasurable, match="loss of step 0 is"):
        hessian(freeze(problem, loss=torch.tensor(math.nan)), method=method) @ v


class Kink(nn.Module):
    """``(relu(a) - 1)^2 / 2 + b^2 / 2`` just left of the kink: the Hessian is diag(0, 1) there."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([-1e-9, 0.3], dtype=f64))

    def forward(self):
        return 0.5 * (self.theta[0].relu() - 1) ** 2 + 0.5 * self.theta[1] ** 2


@pytest.mark.parametrize("method", METHODS)
def test_a_kink_is_not_taken_for_curvature(method):
    close(hessian(freeze(Kink()), method=method).dense(), torch.diag(torch.tensor([0.0, 1.0])), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_leaves_no_trace(method):
    problem = networks()["convolution"]
    before, state = [p.detach().clone() for p in problem.parameters()], torch.get_rng_state()
    snapshot = freeze(problem, SGD(problem.parameters(), lr=0.1))
    with torch.no_grad():  # as inside Metric.update
        stability_threshold(snapshot, method=method)
    for p, original in zip(problem.parameters(), before):
        assert torch.equal(p, original) and p.grad is None
    assert torch.equal(torch.get_rng_state(), state)


# The sharpness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, tol", [("exact", 1e-10), ("finite_difference", 1e-5)])
@pytest.mark.parametrize("name", networks())
def test_sharpness_is_the_largest_algebraic_eigenvalue(name, method, tol):
    problem = networks()[name]
    H = dense_hessian(problem)
    found = top_eigenvalue(freeze(problem), steps=len(H), tol=1e-7, method=method)
    assert found.converged
    close(found.value, torch.linalg.eigvalsh(H)[-1], tol)
    (theirs,) = eigsh(SciPyOperator(H.shape, matvec=H.numpy().dot), k=1, which="LA", return_eigenvectors=False)
    close(found.value, theirs, tol)
    residual = torch.linalg.vector_norm(H @ found.vector - found.value * found.vector)
    assert residual <= found.residual + 10 * tol * found.value


def test_sharpness_at_interpolation_is_that_of_the_tangent_kernel():
    problem, answer = interpolating_tanh()
    for method, tol in (("exact", 1e-10), ("finite_difference", 1e-6)):
        close(top_eigenvalue(freeze(problem), steps=21, tol=1e-9, method=method).value, answer, tol)


def test_an_unconverged_value_is_a_lower_bound_with_its_residual():
    problem = regression()
    spectrum = torch.linalg.eigvalsh(dense_hessian(problem))
    found = top_eigenvalue(freeze(problem), steps=3, tol=1e-9, method="exact")
    assert not found.converged and found.products == 3
    assert found.value < spectrum[-1] and (spectrum - found.value).abs().min() <= found.residual


def test_a_warm_start_that_is_no_longer_the_top_is_left():
    problem = Quadratic(torch.diag(torch.linspace(0, 9, 30, dtype=f64)))
    stale = torch.eye(30, dtype=f64)[27] + 1e-6 * random(30)  # with a residual that looks converged
    close(top_eigenvalue(freeze(problem, gradient=None), start=stale, steps=30, tol=1e-3).value, 9.0, 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "spectrum", [[-4.0, -1.0, -2.0], [-30.0, 2.0, 1.0], [5.0, 5.0, 5.0], [0.0, 0.0], [3.0], [-3.0]], ids=str
)
def test_degenerate_spectra(spectrum, method):
    problem = Quadratic(symmetric(spectrum))
    found = top_eigenvalue(freeze(problem), method=method)
    assert found.converged
    close(found.value, max(spectrum), 1e-6 * max(map(abs, spectrum)) + 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_linear_has_sharpness_zero(method):
    net = nn.Linear(3, 1).double()
    replay = lambda: net(random(4, 3)).mean()  # noqa: E731
    close(top_eigenvalue(freeze(net, replay=replay), method=method).value, 0.0, 1e-8)


def test_one_sample():
    problem = regression(samples=1)
    found = top_eigenvalue(freeze(problem), steps=21, tol=1e-9, method="exact")
    close(found.value, torch.linalg.eigvalsh(dense_hessian(problem))[-1], 1e-10)


# The edge -----------------------------------------------------------------------------------------------------------

BETAS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.9},
    {"momentum": 0.5, "dampening": 0.2},
    {"dampening": 0.5},  # without momentum SGD ignores it
]


def test_stability_constants():
    assert stability_constant() == 2.0
    for (dampening, nesterov), value in MOMENTUM_EDGES.items():
        assert stability_constant(0.9, dampening, nesterov) == pytest.approx(value, rel=1e-14)
    with pytest.raises(Unmeasurable, match="dampening"):
        stability_constant(0.9, dampening=1.0)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("rates", [(1.0, 1.0), (3.0, 0.2)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3], ids="decay={}".format)
def test_courant_1_is_where_the_real_step_loses_its_stability(betas, rates, decay):
    """An independent witness of the constants: the spectral radius of the dense Jacobian of the step crosses 1."""
    problem = Quadratic(symmetric([0.1, 0.5, 2.0, 7.0]), sizes=(1, 3))
    groups = [{"params": [p], "lr": rate} for p, rate in zip(problem.parts, rates)]

    def measured(scale):
        optimizer = SGD([{**g, "lr": scale * g["lr"]} for g in groups], weight_decay=decay, **betas)
        take(SGD(problem.parameters(), lr=0.0), problem())
        for p in problem.parts:  # past the first step, where the buffer exists
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        snapshot = freeze(problem, optimizer)
        radius = torch.linalg.eigvals(step_jacobian(snapshot, method="exact").dense()).abs().max()
        return stability_threshold(snapshot, steps=4, tol=1e-10, method="exact"), radius

    critical = 1 / float(measured(1.0)[0].courant)
    for factor in (0.1, 0.5, 0.99, 1.01, 3.0):
        found, radius = measured(factor * critical)
        close(found.courant, factor, 1e-9)
        assert bool(radius > 1) == (factor > 1)
    close(measured(critical)[1], 1.0, 1e-6)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.7, 0.7), (0.7, 0.1)], ids=str)
@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.5, 0.02)], ids=str)
@pytest.mark.parametrize("method, tol", [("exact", 1e-9), ("finite_difference", 1e-5)])
def test_edge_is_the_dense_one(rates, decays, maximize, method, tol):
    problem = regression()
    parts = list(problem.parameters())
    optimizer = SGD(
        [{"params": p, "lr": r, "weight_decay": w} for p, r, w in zip((parts[:2], parts[2:]), rates, decays)],
        momentum=0.9,
        lr=1.0,
        maximize=maximize,
    )
    H = dense_hessian(problem)
    rate, decay = (torch.tensor([12 * [a] + 9 * [b] for a, b in [pair]], dtype=f64)[0] for pair in (rates, decays))
    decayed = (-H if maximize else H) + torch.diag(decay)
    stretched = torch.linalg.eigvals(torch.diag(rate) @ decayed).real.max()

    found = stability_threshold(freeze(problem, optimizer), steps=21, tol=1e-8, method=method)
    close(found.sharpness, torch.linalg.eigvalsh(H)[-1], tol)
    close(found.courant, stretched / 3.8, tol)
    close(found.limit, torch.linalg.eigvalsh(decayed)[-1] * 3.8 / stretched, 20 * tol)
    symmetric_one = torch.diag(rate.sqrt()) @ decayed @ torch.diag(rate.sqrt())
    image = symmetric_one @ found.mode
    assert (image - (found.mode @ image) * found.mode).norm() < 1e-4 * image.norm()
    root = torch.as_tensor(found.root, dtype=f64)
    if rates[0] == rates[1] and decays[0] == decays[1]:  # then the mode is that of H itself
        close(found.limit, 3.8 / rates[0], 20 * tol)
        root = torch.tensor(1.0)
    symmetric_form = (root * (decayed * root).T).T
    value = found.mode @ symmetric_form @ found.mode
    close(symmetric_form @ found.mode, value * found.mode, 1e-3 * value.abs())
    close(value, torch.linalg.eigvalsh(symmetric_form)[-1], 10 * tol)


def test_a_parameter_that_the_optimizer_does_not_hold_has_no_say():
    """Two optimizers share a module: each has its own edge, whatever the betas of the other."""
    problem = regression()
    parts = list(problem.parameters())
    snapshot = freeze(problem, SGD(parts[:2], lr=0.3, momentum=0.9))
    held = torch.linalg.eigvalsh(dense_hessian(problem)[:12, :12])[-1]
    close(stability_threshold(snapshot, steps=21, tol=1e-8, method="exact").courant, 0.3 * held / 3.8, 1e-9)


def test_what_has_no_common_edge_is_refused():
    problem = regression()
    parts = list(problem.parameters())
    groups = [{"params": parts[:2], "momentum": 0.9}, {"params": parts[2:], "momentum": 0.5}]
    with pytest.raises(Unmeasurable, match="different momentum"):
        stability_threshold(freeze(problem, SGD(groups, lr=0.1)))


class Halved(SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    "optimizer, settings, reason",
    [
        (lambda p: torch.optim.Adadelta(p), {}, "Adadelta is not supported"),
        (lambda p: Halved(p), {}, "overrides SGD.step"),
        (lambda p: None, {}, "no optimizer"),
        (lambda p: SGD(p), {"unsupported": "gradients are clipped"}, "clipped"),
    ],
)
def test_what_is_not_modelled_is_refused(optimizer, settings, reason):
    problem = regression()
    snapshot = freeze(problem, optimizer(problem.parameters()), **settings)
    with pytest.raises(Unmeasurable, match=reason):
        stability_threshold(snapshot)
    metric = Sharpness()
    if snapshot.optimizer is None or settings:
        with pytest.raises(Unmeasurable, match=reason):
            metric.update(snapshot)
    else:  # the eigenvalue itself needs no edge
        metric.update(snapshot)
        assert reason in (metric.unknown_update(snapshot) or "")
        assert metric.compute().keys() == set(metric.without_update)


@pytest.mark.parametrize("groups", [1, 2])
def test_at_rate_zero_the_courant_number_is_0_and_there_is_no_limit(groups):
    problem = regression()
    parts = list(problem.parameters())
    optimizer = SGD([{"params": parts[:2]}, {"params": parts[2:], "weight_decay": 0.1 * (groups - 1)}], lr=0.0)
    metric = Sharpness(method="exact")
    metric.update(freeze(problem, optimizer))
    values = metric.compute()
    assert values["stability/courant_gd"] == 0.0
    assert "stability/sharpness_limit" not in values
    close(values["stability/sharpness"], torch.linalg.eigvalsh(dense_hessian(problem))[-1], 0.05)


def test_gradient_descent_reaches_the_edge():
    """Cohen et al. 2021: sharpness rises until it hovers just above 2 / lr (15 seeds: Courant 0.97 to 1.19)."""
    problem = chebyshev(seed=2)
    optimizer = SGD(problem.parameters(), lr=0.2)
    courant = {}
    for step in range(1201):
        if step in (0, 600, 900, 1200):
            courant[step] = float(
                stability_threshold(freeze(problem, optimizer, step=step), tol=1e-3, steps=30).courant
            )
        take(optimizer, problem())
    assert courant.pop(0) < 0.8
    assert all(0.97 < value < 1.19 for value in courant.values()), courant
