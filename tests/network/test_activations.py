"""Slopes of activations against a fine grid."""

import pytest
import torch
from problems import close, f64
from torch import nn
from transformers.activations import ACT2FN, NewGELUActivation

from lsp_callbacks.functional.network.activations import FLAT, LIPSCHITZ, activation_lipschitz, activation_slope, flat

GRID = torch.linspace(-30, 30, 600_001, dtype=f64)
SETTINGS = [
    nn.ELU(2.0), nn.CELU(0.3), nn.LeakyReLU(-1.5), nn.PReLU(init=3.0), nn.RReLU(0.1, 1.2), nn.GELU("tanh"),
    nn.Threshold(0.1, 0.1), nn.Softplus(beta=3.0), nn.Hardtanh(-2.0, 5.0), nn.Hardshrink(0.0), nn.ReLU(inplace=True),
]  # fmt: skip
NAMED = [getattr(nn, name)() for name in LIPSCHITZ if hasattr(nn, name) and name not in ("Threshold", "Hardshrink")]
THEIRS = [ACT2FN[name] for name in ("gelu", "gelu_new", "gelu_fast", "quick_gelu", "gelu_pytorch_tanh", "silu")]


@pytest.mark.parametrize("module", [*NAMED, *SETTINGS, *THEIRS], ids=repr)
def test_no_slope_exceeds_the_constant_and_one_attains_it(module):
    module = module.double().eval()
    slopes = activation_slope(module, GRID).abs()
    constant = activation_lipschitz(module)
    assert slopes.max() <= constant * (1 + 1e-7)  # PyTorch has some of the constants in float32
    # A random slope has its limits, not its mean, for a bound.
    assert slopes.max() >= 0.999 * constant or isinstance(module, nn.RReLU)
    with torch.no_grad():
        y = module(GRID.clone())
    secants = (y[1:] - y[:-1]).abs() / (GRID[1] - GRID[0])
    close(secants.max(), slopes.max(), 1e-3)


def test_what_jumps_or_is_not_known_has_no_constant():
    class ReLU(nn.Module):
        """Not PyTorch's."""

    for module in (nn.Hardshrink(), nn.Threshold(0.0, 1.0), nn.Softmax(-1), nn.Linear(1, 1), ReLU()):
        assert activation_lipschitz(module) is None


def test_slopes_at_points():
    x = torch.tensor([[-1.0, 0.0], [2.0, 7.0]], dtype=f64)
    close(activation_slope(nn.ReLU6(inplace=True), x), [[0, 0], [1, 0]], 0)
    close(activation_slope(torch.tanh, x), 1 - x.tanh().square(), 1e-12)
    assert not x.requires_grad
    assert activation_slope(nn.Tanh(), torch.empty(0, 3)).shape == (0, 3)
    assert activation_slope(NewGELUActivation(), torch.tensor([float("nan")])).isnan()


@pytest.mark.parametrize("function, edge, constant", [(torch.tanh, 2.178, 1.0), (torch.sigmoid, 4.357, 0.25)])
def test_flat_is_a_twentieth_of_the_largest_slope(function, edge, constant):
    assert FLAT == 0.05
    for x, expected in ((edge - 0.01, False), (edge + 0.01, True), (-edge - 0.01, True)):
        assert bool(flat(activation_slope(function, torch.tensor(x)), constant)) is expected
