"""Rows that are kept in sketches, and their Gram matrix."""

import pytest
import torch
from output_row import output_row
from torch import nn
from torch.nn import functional as F

from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part
from lsp_callbacks.operators.sgd.recent_rows import SIZE, RecentRows, RowSketch


@pytest.mark.parametrize("entries", [1000, SIZE, 10 * SIZE + 123])
def test_products_of_sketches_are_those_of_the_rows(entries):
    torch.manual_seed(0)
    rows = torch.randn(6, entries, dtype=torch.float64) + 0.3  # not orthogonal
    sketch = RowSketch(6, rows)
    for lo in range(0, entries, 50_001):
        sketch.add(lo, rows[:, lo : lo + 50_001])
    gram, expected = sketch.values @ sketch.values.T, rows @ rows.T
    sizes = expected.diagonal().sqrt()
    error = ((gram - expected) / sizes[:, None] / sizes).abs().amax()
    assert error <= (1e-12 if entries <= SIZE else 5 / SIZE**0.5)


class Tokens(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 5), nn.LayerNorm(5)
        self.hidden, self.head = nn.Linear(5, 5), nn.Linear(5, 6, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        h = self.table(x)
        return self.head(self.norm(h + torch.tanh(self.hidden(h)).cumsum(1)))


@pytest.mark.parametrize("tied", [False, True])
def test_of_steps_at_the_same_weights_all_rows_have_their_gram_matrix(tied):
    torch.manual_seed(0)
    net = Tokens(tied).double()
    with torch.no_grad():
        for p in net.parameters():  # outputs that are apart: eigenvectors are then clear
            p.mul_(2.0)
    scale = {name: 0.5 + torch.rand_like(p) for name, p in net.named_parameters()}
    recent, chosen, kind = RecentRows(3), [], None
    x, y = torch.randint(0, 6, (4, 5)), torch.randint(0, 6, (4, 5))
    for step in range(5):
        rows = GraphRows(net, torch.Generator().manual_seed(step), lambda n: n, lambda n: 1, known=kind, recent=recent)
        rows.saw_loss(F.cross_entropy(net(x).flatten(0, 1), y.flatten()), samples=4, factor=1.0, micro_batches=1)
        assert rows.failure is None
        rows.form(scale)
        kind, kernel = rows.kind, rows.kernel(None, None)
        chosen.append(rows.chosen[0].positions[:, 0])
    assert kernel.rows == len(recent) == 3 and kernel.samples == 4
    expected = _dense(net, x, torch.stack(chosen[-3:], dim=1), scale)
    assert (kernel.gram.abs() - expected.abs()).abs().amax() <= 2e-3 * expected.amax()  # eigenvectors have signs


def _dense(net, x, positions, scale):
    parameters = [*net.parameters()]
    roots = [scale[name].sqrt().flatten() for name, _ in net.named_parameters()]
    outputs, rows = net(x), []
    for i, k in [(sample, int(place)) for sample in range(len(x)) for place in positions[sample]]:
        p = outputs[i, k].detach().softmax(-1)
        row = output_row(torch.diag(p) - p[:, None] * p, parameters)
        grads = torch.autograd.grad(outputs[i, k], parameters, row, retain_graph=True)
        rows.append(torch.cat([g.flatten() * root for g, root in zip(grads, roots)]))
    z = torch.stack(rows) / positions.shape[1] ** 0.5  # the loss of a sample is the mean over its positions
    return z @ z.T


def test_steps_with_another_number_of_samples_begin_anew():
    recent = RecentRows(3)
    recent.add(torch.ones(4, 2, 8), torch.ones(4, 2))
    assert len(recent) == 2 and recent.gram().shape == (8, 8)
    recent.add(torch.ones(3, 1, 8), torch.ones(3, 1))
    assert len(recent) == 1 and recent.gram().shape == (3, 3)


def test_what_comes_in_blocks_is_what_comes_at_once(monkeypatch):
    from lsp_callbacks.operators.sgd.layer_rules import linear_uses

    torch.manual_seed(0)
    x, g, scale = torch.randn(3, 4, 5).double(), torch.randn(3, 2, 4, 6).double(), torch.rand(6, 5).double()
    for transposed in (False, True):
        weights = scale.T if transposed else scale
        gram = ParameterGram([Part(3, [linear_uses(x, g, transposed=transposed)["weight"]])])
        z = gram.parts[0].gradients(0, 3).flatten(0, 1) * weights.reshape(-1).sqrt()
        monkeypatch.setattr("lsp_callbacks.operators.sgd.parameter_gram.BLOCK", 12)
        assert torch.allclose(gram.gram(weights, 2**20, 30), z @ z.T)
