import pytest
import torch

from lsp_callbacks.operators.sgd.layer_rules import dense, linear_uses
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part
from lsp_callbacks.operators.sgd.reused_block import Block


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("order", ["nrto,nti->nroi", "nrto,nti->nrio", "nro,nri->nroi", "nro,nri->nrio"])
def test_a_product_is_that_of_einsum_in_the_memory_of_the_last_one(order, rows):
    block, place = Block(), set()
    for _ in range(3):
        positions = (7,) if "t" in order else ()
        g, a = torch.randn(5, rows, *positions, 4), torch.randn(5, *(positions or (rows,)), 6)
        product = block.product(order, g, a)
        torch.testing.assert_close(product, torch.einsum(order, g, a).flatten(2))
        place.add(product.data_ptr())
    assert len(place) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_leave_what_they_are_formed_from_as_it_is(transposed, monkeypatch):
    monkeypatch.setattr("lsp_callbacks.operators.sgd.parameter_gram.BLOCK", 64)
    x, g = torch.randn(8, 5, 6), torch.randn(8, 2, 5, 4)
    held = torch.randn(8, 2, 24)
    weight = linear_uses(x, g, transposed=transposed)["weight"]
    scale = torch.rand(24) + 0.5
    for use in (weight, dense(held)):
        rows = use.gradients(0, 8).flatten(0, 1).clone()
        gram = ParameterGram([Part(8, [use])])
        for _ in range(2):
            blocks = [(lo, block.clone()) for lo, block in gram.blocks(scale.sqrt(), 24)]
            assert len(blocks) > 1
            torch.testing.assert_close(torch.cat([block for _, block in blocks], dim=1), rows * scale.sqrt())
            torch.testing.assert_close(gram.gram(scale, 2**20, 24), (rows * scale) @ rows.T)
    torch.testing.assert_close(held.flatten(0, 1), rows)
