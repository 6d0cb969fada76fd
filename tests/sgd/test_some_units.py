"""Products of rows from the gradients of some units of a layer."""

import pytest
import torch

from lsp_callbacks.operators.sgd.layer_rules import linear_uses
from lsp_callbacks.operators.sgd.nonzero_positions import nonzero_positions, uses_at_positions
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part
from lsp_callbacks.operators.sgd.some_units import FEWEST, take_units

SAMPLES, POSITIONS, UNITS, NUMBERS = 6, 5, 160, 64


def layer(transposed, is_sparse):
    """Inputs, gradients whose units differ widely in size, and the use of the weight."""
    a = torch.randn(SAMPLES, POSITIONS, UNITS if transposed else NUMBERS, dtype=torch.float64)
    g = torch.randn(SAMPLES, 1, POSITIONS, NUMBERS if transposed else UNITS, dtype=torch.float64)
    (a if transposed else g).mul_(torch.logspace(0, -2, UNITS, dtype=torch.float64))
    if is_sparse:
        g[:, :, 2:] = 0
        return a, g, uses_at_positions(a, [nonzero_positions(g[:, 0])], transposed=transposed)["weight"]
    return a, g, linear_uses(a, g, transposed=transposed)["weight"]


def share(use, scale, fraction):
    return ParameterGram([Part(SAMPLES, [use])]).gram(scale, 2**24, UNITS * NUMBERS, fraction=fraction)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_products_from_some_units_are_right_in_the_mean_and_their_trace_in_each(transposed, is_sparse, is_scaled):
    torch.manual_seed(0)
    a, g, use = layer(transposed, is_sparse)
    rows = torch.einsum("nrto,nti->nio" if transposed else "nrto,nti->noi", g, a)
    scale = torch.rand_like(rows[0]) if is_scaled else 1.0
    expected = torch.einsum("nij,mij->nm", rows * scale, rows)
    torch.testing.assert_close(share(use, scale, None), expected)
    shares = [share(use, scale, (k + 0.5) / 200) for k in range(200)]
    size = expected.diagonal().sqrt()
    error = (torch.stack(shares).mean(0) - expected) / size / size[:, None]
    assert error.abs().amax() < 0.01  # over all offsets at equal distances
    traces = torch.stack([each.trace() for each in shares]) / expected.trace()
    assert traces.std() < 0.05 and not torch.equal(shares[0], expected)


def test_small_layers_have_all_units():
    torch.manual_seed(0)
    _, _, use = layer(False, False)
    few = linear_uses(torch.randn(2, 3, 4), torch.randn(2, 1, 3, FEWEST))["weight"]
    assert take_units([few.units], None, 0.5) is None
    taken = take_units([use.units], None, 0.5)
    assert len(taken.index) == UNITS // 4 and len(taken.index.unique()) == UNITS // 4
