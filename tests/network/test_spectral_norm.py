import copy
import math

import pytest
import torch
from problems import (
    CONVOLUTION_NORM,
    FEEDFORWARD,
    KERNEL,
    RESHAPED_KERNEL_NORM,
    Regression,
    close,
    f64,
    random,
    same,
    seeded,
)
from scipy.signal import convolve2d, correlate2d
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import svds
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from transformers.pytorch_utils import Conv1D

from lsp_callbacks import Snapshot, SpectralNorm, Unmeasurable
from lsp_callbacks.functional import log_sum, spectral_norm, weight_norms, weight_operators
from lsp_callbacks.linalg import from_matrix, lyapunov_exponents
from lsp_callbacks.step.batch import MicroBatch
from lsp_callbacks.step.module_copy import ModuleCopy
from lsp_callbacks.step.replay import replayer

norm2 = torch.linalg.matrix_norm

#: layer and the shape of one input.
MAPS = {
    "linear": (nn.Linear(5, 3), (5,)),
    "linear_wide": (nn.Linear(3, 7, bias=False), (3,)),
    "one_number": (nn.Linear(1, 1), (1,)),
    "transformers_conv1d": (Conv1D(4, 6), (6,)),
    "conv1d": (nn.Conv1d(2, 3, 3), (2, 7)),
    "conv1d_same": (nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 7)),
    "conv2d": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 5)),
    "conv2d_groups": (nn.Conv2d(4, 6, 3, groups=2, padding=(1, 0)), (4, 5, 5)),
    "conv2d_dilated": (nn.Conv2d(1, 2, 2, dilation=(2, 1), bias=False), (1, 6, 5)),
    "conv2d_depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 4, 4)),
    "conv2d_pointwise": (nn.Conv2d(3, 5, 1), (3, 4, 4)),
    "conv3d": (nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), (1, 3, 4, 3)),
    **{
        f"conv2d_{mode}": (nn.Conv2d(2, 2, 3, padding=1, stride=2, padding_mode=mode), (2, 5, 5))
        for mode in ("reflect", "replicate", "circular")
    },
    "transposed1d": (nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 4)),
    "transposed3d": (nn.ConvTranspose3d(1, 2, 2, dilation=2), (1, 3, 3, 2)),
}


def materialised(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Brute force: the layer itself on every unit vector, less what it makes of zero."""
    units = torch.eye(math.prod(shape), dtype=f64).reshape(-1, *shape)
    with torch.no_grad():
        return (layer(units) - layer(torch.zeros_like(units))).flatten(1).T


# One layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_norm_is_that_of_the_map_that_the_layer_applies(name):
    layer, shape = MAPS[name]
    layer = seeded(layer)
    A = materialised(layer, shape)
    operator = weight_operators(layer, shape)[""]
    close(operator.dense(), A, 1e-13)
    x, y = random(A.shape[1], seed=1), random(A.shape[0], seed=2)
    close((operator @ x) @ y, x @ (operator.T @ y), 1e-12)

    found = weight_norms(layer, shape, steps=200, tol=1e-8)[""]
    assert found.converged
    close(found.value, norm2(A, 2), 1e-12)
    if min(A.shape) > 1:
        (theirs,) = svds(A.numpy(), k=1, return_singular_vectors=False)
        close(found.value, theirs, 1e-10)
    close(weight_norms(layer, (9, *shape))[""].value, found.value, 1e-2)  # a batch axis changes nothing


@pytest.mark.parametrize("mode, stride", CONVOLUTION_NORM)
def test_a_convolution_is_not_its_reshaped_kernel(mode, stride):
    layer = nn.Conv2d(1, 1, 3, padding=1, stride=stride, padding_mode=mode, bias=False).double()
    layer.weight.data[0, 0] = KERNEL
    value = weight_norms(layer, (1, 8, 8), steps=64, tol=1e-10)[""].value
    close(value, CONVOLUTION_NORM[mode, stride], 1e-9)
    close(norm2(KERNEL.reshape(1, 9), 2), RESHAPED_KERNEL_NORM, 1e-12)
    assert value > 1.1 * RESHAPED_KERNEL_NORM


def test_circular_padding_agrees_with_the_transfer_function():
    """Sedghi et al. 2019: at stride 1 the singular values are those of the kernel's 2-D Fourier transform."""
    layer = seeded(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    transfer = torch.fft.fft2(layer.weight.detach(), s=(8, 8)).permute(2, 3, 0, 1)
    expected = torch.linalg.svdvals(transfer).max()
    close(weight_norms(layer, (3, 8, 8), steps=192, tol=1e-10)[""].value, expected, 1e-10)


def test_the_norm_of_a_convolution_depends_on_the_size_of_its_input():
    layer = seeded(nn.Conv2d(1, 1, 3, padding=1))
    small, large = (weight_norms(layer, (1, n, n), tol=1e-8)[""].value for n in (2, 12))
    assert abs(small - large) > 0.05 * large
    with pytest.raises(ValueError, match="input_shape"):
        weight_norms(layer)


def test_a_transposed_convolution_that_was_asked_for_another_size():
    layer = seeded(nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1))
    for size in (9, 10):
        A = torch.stack([layer(e[None, None], output_size=[size])[0, 0] for e in torch.eye(5, dtype=f64)], 1).detach()
        A = A - layer.bias.detach()
        found = weight_norms(layer, (1, 5), output_shape=(1, 1, size), tol=1e-10)[""].value
        close(found, norm2(A, 2), 1e-12)


@pytest.mark.parametrize("dims", [{}, {"kdim": 3, "vdim": 5}], ids=["packed", "separate"])
def test_attention_projections(dims):
    layer = seeded(nn.MultiheadAttention(4, 2, batch_first=True, **dims))
    separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    weights = separate if dims else layer.in_proj_weight.split(4)
    found = weight_norms(layer, steps=10, tol=1e-10)
    assert list(found) == ["q", "k", "v", "out_proj"]
    for pair, weight in zip(found.values(), [*weights, layer.out_proj.weight]):
        close(pair.value, norm2(weight.detach(), 2), 1e-12)


def test_embedding_is_the_transpose_of_its_table():
    layer = seeded(nn.Embedding(7, 3))
    (operator,) = weight_operators(layer, (4,)).values()
    one_hot = torch.eye(7, dtype=f64)
    for i in range(7):
        close(operator @ one_hot[i], layer(torch.tensor(i)).detach(), 0)


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, hooked_spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("kind, sizes, shape", [(nn.Linear, (4, 3), (4,)), (nn.Conv2d, (1, 2, 3), (1, 5, 5))])
def test_parametrised_weights_are_read_as_applied_and_not_moved(wrap, kind, sizes, shape):
    layer = wrap(kind(*sizes)).double()
    for _ in range(3):
        layer(random(2, *shape))
    layer.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    found = weight_norms(layer, shape, steps=50, tol=1e-10)[""].value
    close(found, norm2(materialised(layer, shape), 2), 1e-12)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("layer, shape", [(nn.Linear(3, 2), (3,)), (nn.Conv2d(1, 1, 3), (1, 4, 4))], ids=repr)
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_degenerate_weights(layer, shape, value):
    nn.init.constant_(layer.weight, value)
    found = weight_norms(layer, shape)[""]
    assert float(found.value) == pytest.approx(value, nan_ok=True)
    assert float(found.residual) == pytest.approx(value, nan_ok=True)
    assert found.converged is (value == 0.0)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, tol):
    layer = seeded(nn.Linear(20, 10)).to(dtype)
    exact = norm2(layer.weight.detach().double(), 2)
    close(weight_norms(layer, steps=20, tol=1e-4)[""].value, exact, tol * exact)


def test_a_module_without_a_linear_part_is_refused():
    for module in (nn.ReLU(), nn.LayerNorm(3), nn.LSTM(2, 2)):
        with pytest.raises(ValueError, match=type(module).__name__):
            weight_norms(module)


# All layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_the_product_bound_and_what_really_happens(name):
    case = FEEDFORWARD[name]
    layers = []
    for W in case.layers:
        layers.append(nn.Linear(2, 2, bias=False).double())
        layers[-1].weight.data = W
    norms = [weight_norms(layer, tol=1e-10)[""].value for layer in layers]
    close(log_sum(norms) / len(layers), case.bound, 1e-12)
    product = torch.linalg.multi_dot(case.layers[::-1])
    close(norm2(product, 2).log() / len(layers), case.actual, 1e-12)
    rates = lyapunov_exponents([from_matrix(W) for W in case.layers], torch.eye(2, dtype=f64)).mean(0)
    close(rates.sum(), torch.linalg.det(product).abs().log() / len(layers), 1e-12)
    assert rates.max() <= case.actual + 1e-12 <= case.bound + 2e-12


class Model(nn.Module):
    """Every kind of layer that needs care: tied, not called, wrapped, called as a function."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normed = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.hooked = hooked_spectral_norm(nn.Linear(4, 4))
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.twin = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.twin.parametrizations.weight.original = self.normed.parametrizations.weight.original

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.twin(self.hooked(self.normed(self.attention(x, x, x, need_weights=False)[0])))
        return self.head(self.convolution(x.mT).mT)


def model(length: int = 5) -> tuple[Regression, Snapshot]:
    """The model after a forward pass, which moved the vectors of its power iterations, and that step."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (3, length), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = Regression(Model().double(), tokens, torch.zeros(3, 1, 1, dtype=f64))
    module_copy = ModuleCopy(problem)
    replay = replayer(module_copy, [MicroBatch(None, lambda module, batch: module())])
    return problem, Snapshot(step=0, module=module_copy.module, replay=replay, loss=problem().detach())


def test_every_layer_that_the_step_called_is_measured_once():
    (problem, snapshot), metric = model(), SpectralNorm()
    metric.update(snapshot)
    values, net = metric.compute(), problem.net
    expected = {
        "table": net.table.weight,
        **{f"attention.{k}": w for k, w in zip("qkv", net.attention.in_proj_weight.chunk(3))},
        "attention.out_proj": net.attention.out_proj.weight,
        "normed": net.eval().normed.weight,
        "hooked": net.hooked.weight,
        "convolution": materialised(net.convolution, (4, 5)),
    }
    prefix = "stability/spectral_norm/net."
    assert {k.removeprefix(prefix) for k in values if k.startswith(prefix)} == set(expected)
    norms = {name: norm2(w.detach(), 2) for name, w in expected.items()}
    for name, norm in norms.items():
        close(values[prefix + name], norm, 1e-2)
        assert values[prefix + name] <= norm * (1 + 1e-9)
    close(values["stability/spectral_norm_max"], max(norms.values()), 1e-2)
    close(values["stability/spectral_log_sum"], log_sum(list(norms.values())), 1e-2)
    close(values["stability/embedding_row_norm/net.table"], net.table.weight.detach().norm(dim=1).max(), 1e-12)
    assert 0 <= values["stability/spectral_norm_residual"] < 1e-2


def test_a_measurement_starts_from_the_last_and_survives_another_input_size():
    metric = SpectralNorm()
    for length in (5, 5, 8):
        problem, snapshot = model(length)
        metric.update(snapshot)
        A = materialised(problem.net.convolution, (4, length))
        close(metric.compute()["stability/spectral_norm/net.convolution"], norm2(A, 2), 1e-2)


def test_layers_can_be_chosen():
    metric = SpectralNorm(layers=["net.h*", nn.Conv1d])
    metric.update(model()[1])
    chosen = {k.split(".")[-1] for k in metric.compute() if "spectral_norm/" in k}
    assert chosen == {"hooked", "head", "convolution"}


def test_nothing_to_measure_gives_nothing():
    problem, metric = Regression(nn.Tanh(), random(2, 2), random(2, 2)), SpectralNorm()
    metric.update(Snapshot(step=0, module=problem, replay=problem))
    assert metric.compute() == {}


# spectral_norm of one layer, as a tensor ------------------------------------------------------------------------------


def test_of_a_circular_convolution_it_is_the_largest_fourier_block():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular").double()
    blocks = torch.fft.fft2(layer.weight.detach(), (16, 16)).permute(2, 3, 0, 1)
    value = spectral_norm(layer, 16)
    close(value, torch.linalg.matrix_norm(blocks, 2).max(), 1e-3)
    assert value.dtype == f64 and value.shape == () and not value.requires_grad
    close(spectral_norm(layer, (16, 16), tol=1e-6), torch.linalg.matrix_norm(blocks, 2).max(), 1e-6)


def test_of_the_mean_of_a_neighbourhood_with_zeros_around_it_is_a_product_of_cosines():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.constant_(layer.weight, 1 / 9)
    for h, w in ((5, 8), (24, 24)):  # by its dense matrix, and by Lanczos
        side = [(1 + 2 * math.cos(math.pi / (n + 1))) / 3 for n in (h, w)]
        close(spectral_norm(layer, (h, w)), side[0] * side[1], 1e-3)


PLAIN_LAYERS = {
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (22, 19)),
    "dilated groups": (lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=2), (17, 17)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (11, 12)),
    "one axis": (lambda: nn.Conv1d(5, 6, 5, padding="same"), (90,)),
    "small": (lambda: nn.Conv2d(2, 3, 3, padding=1), (6, 5)),
}


@pytest.mark.parametrize("name", PLAIN_LAYERS)
@pytest.mark.parametrize("dtype", [f64, torch.float32])
def test_it_is_the_largest_singular_value_of_the_dense_map(name, dtype):
    torch.manual_seed(0)
    make, size = PLAIN_LAYERS[name]
    layer = make().to(dtype)
    double = copy.deepcopy(layer).double()
    shape = (layer.in_channels, *size)
    units = torch.eye(math.prod(shape), dtype=f64).view(-1, *shape)
    with torch.no_grad():
        matrix = (double(units) - double(torch.zeros(1, *shape, dtype=f64))).flatten(1)
    exact = torch.linalg.svdvals(matrix)[0]
    value = spectral_norm(layer, size)
    assert 0.999 * exact <= value <= (1 + 1e-5) * exact


def test_scipy_finds_the_same_from_its_own_convolution():
    layer = nn.Conv2d(1, 1, 5, bias=False).double()
    kernel = layer.weight.detach()[0, 0].numpy()
    operator = ScipyOperator(
        (16 * 16, 20 * 20),
        matvec=lambda v: correlate2d(v.reshape(20, 20), kernel, mode="valid").ravel(),
        rmatvec=lambda u: convolve2d(u.reshape(16, 16), kernel, mode="full").ravel(),
        dtype=float,
    )
    close(spectral_norm(layer, 20, tol=1e-6), svds(operator, k=1)[1][0], 1e-6)


def test_linear_embedding_and_a_parametrised_weight():
    torch.manual_seed(0)
    for layer in (nn.Linear(7, 4), nn.Linear(400, 300), nn.Embedding(9, 5)):
        close(spectral_norm(layer), torch.linalg.matrix_norm(layer.weight.double(), 2), 1e-3)
    layer = parametrizations.spectral_norm(nn.Linear(6, 5), n_power_iterations=100)
    close(spectral_norm(layer), 1.0, 1e-3)
    layer = parametrizations.spectral_norm(nn.Linear(60, 50))  # reading it in training mode would move its buffers
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    spectral_norm(layer)
    assert same(before, layer.state_dict()) and layer.training and torch.equal(state, torch.get_rng_state())
    assert layer.parametrizations.weight.original.grad is None


@pytest.mark.parametrize(
    "layer, size, settings, match",
    [
        (nn.Conv2d(1, 1, 3), None, {}, "input_size=None: .* 2 numbers"),
        (nn.Conv2d(1, 1, 3), (1, 8, 8), {}, r"input_size=\(1, 8, 8\): give 2 numbers"),
        (nn.Conv2d(1, 1, 3), (8, 0), {}, "input_size=0"),
        (nn.Conv2d(1, 1, 3), 8, dict(tol=0.0), "tol=0.0"),
        (nn.Conv2d(1, 1, 3), 8, dict(steps=1), "steps=1"),
        (nn.Linear(2, 2), 8, {}, "input_size=8: only the norm of a convolution"),
        (nn.MultiheadAttention(4, 2), None, {}, r"holds 4 linear maps \(q, k, v, out_proj\).*weight_norms"),
        (nn.ReLU(), None, {}, "has no known linear map"),
        (nn.LazyLinear(3), None, {}, "run one forward pass"),
        (nn.Conv1d(1, 1, 1, dtype=torch.complex64), 8, {}, "complex"),
    ],
)
def test_layers_and_arguments_that_have_no_such_norm_are_refused(layer, size, settings, match):
    with pytest.raises(ValueError, match=match):
        spectral_norm(layer, size, **settings)


def test_what_is_not_finite_or_not_reached_is_refused():
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    with pytest.raises(Unmeasurable, match=r"after steps=3 .* between .* give more steps"):
        spectral_norm(layer, 24, steps=3)
    for size in (3, 24):
        with torch.no_grad():
            layer.weight[0, 0, 0, 0] = math.nan
        with pytest.raises(Unmeasurable, match="not finite"):
            spectral_norm(layer, size)


def test_the_price_knows_where_the_iteration_began_anew():
    """A weight that has stayed is followed by one step; one that became another takes Lanczos, and so may the next."""
    net, x = seeded(nn.Sequential(nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 70))), random(4, 90)
    metric, prices = SpectralNorm(), []

    def measured():
        snapshot = Snapshot(step=len(prices), module=net, replay=lambda: net(x).square().mean())
        metric.update(snapshot)
        prices.append(metric.cost(snapshot)["spectral norms"])

    for _ in range(2):
        measured()
    with torch.no_grad():
        net[0].weight.normal_()
    measured()
    measured()
    assert prices[2] > prices[1] + 1e-6 and prices[3] == pytest.approx(prices[1])
    assert prices[0] < SpectralNorm().cost(Snapshot(step=9, module=net, replay=lambda: net(x).sum()))["spectral norms"]
