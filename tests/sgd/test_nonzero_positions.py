"""Gradients without the positions at which they are zero."""

import pytest
import torch

from lsp_callbacks.operators.sgd.layer_rules import linear_uses
from lsp_callbacks.operators.sgd.nonzero_positions import NonzeroPositions, nonzero_positions, uses_at_positions
from lsp_callbacks.operators.sgd.reused_block import Block


def causal(generator, n=5, length=7, width=4):
    """Gradients of a loss at one position of each sample, which does not depend on the positions after it."""
    g = torch.randn(n, length, width, generator=generator, dtype=torch.float64)
    last = torch.randint(length - 2, (n, 1), generator=generator)
    return g * (torch.arange(length) <= last)[..., None]


def test_only_positions_that_are_not_zero_are_held():
    g = causal(torch.Generator().manual_seed(0))
    kept = nonzero_positions(g)
    assert isinstance(kept, NonzeroPositions)
    assert len(kept.values) == (g != 0).any(-1).sum()
    assert torch.equal(kept.whole(), g)
    assert torch.equal(kept.whole(slice(1, 3)), g[..., 1:3])
    torch.testing.assert_close(kept.sum(), g.sum(1))


def test_gradients_that_are_nowhere_zero_are_held_as_they_are():
    g = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    assert nonzero_positions(g) is g


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_uses_are_those_of_a_linear_map(transposed, passes):
    generator = torch.Generator().manual_seed(1)
    gradients = [causal(generator) for _ in range(passes)]
    a = torch.randn(5, 7, 3, generator=generator, dtype=torch.float64)
    expected = linear_uses(a, torch.stack(gradients, dim=1), transposed=transposed)
    kept = [nonzero_positions(gradients[0]), *gradients[1:]]
    uses = uses_at_positions(a, kept, transposed=transposed)
    brute = torch.stack([torch.einsum("nto,nti->noi", g, a) for g in gradients], dim=1)
    brute = (brute.mT if transposed else brute).flatten(2)
    for name in ("weight", "bias"):
        assert uses[name].rows == passes
        torch.testing.assert_close(uses[name].gradients(1, 4), expected[name].gradients(1, 4))
    torch.testing.assert_close(uses["weight"].gradients(0, 5), brute)
    width = uses["weight"].width
    assert width == expected["weight"].width
    torch.testing.assert_close(uses["weight"].entries(width, 3 * width, Block()), brute[..., width : 3 * width])
