"""Rows of networks that route tokens to experts: who is called with what changes from step to step."""

import pytest
import torch
import torch.nn.functional as F
from output_row import output_row
from torch import nn

from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.probe_set import ProbeSet

N = 4


class Experts(nn.Module):
    """Each token goes to the expert that its first number says."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        flat = x.flatten(0, -2)
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            mine = ((flat[:, 0] > 0).long() == k).nonzero().flatten()
            out = out.index_add(0, mine, torch.tanh(expert(flat[mine])))
        return self.head(out.view_as(x))


def batch(tokens, second):
    """Of ``N tokens`` numbers ``second`` go to the second expert, the last ones of each sample, or whole samples."""
    x = torch.randn(N, tokens, 3, dtype=torch.float64)
    x[..., 0] = -x[..., 0].abs()
    x[:, tokens - second // N :, 0] *= -1
    return (x, torch.randint(0, 3, (N, tokens))) if tokens > 1 else (x[:, 0], torch.randint(0, 3, (N,)))


def loss_of(f, y):
    return F.cross_entropy(f.flatten(0, -2), y.flatten())


def dense_trace(net, x, y):
    """Trace of the Gram matrix of all tokens by brute force: a row for each output Hessian."""
    outputs, total = net(x).flatten(0, -2), 0.0
    for f in outputs:
        p = f.detach().softmax(0)
        parameters = [*net.parameters()]
        u = output_row(torch.diag(p) - p[:, None] * p, parameters)
        z = torch.autograd.grad(f @ u, parameters, retain_graph=True, materialize_grads=True)
        total += sum(float(g.square().sum()) for g in z) / (y.numel() / N)
    return total


def graph_rows(net, x, y, known=None):
    rows = GraphRows(net, torch.Generator().manual_seed(0), lambda n: n, lambda n: 99, known=known)
    rows.saw_loss(loss_of(net(x), y), samples=N, factor=1.0, micro_batches=1)
    return rows


def test_a_graph_in_which_an_expert_gets_fewer_tokens_is_not_read():
    """As many as can be divided among the samples: 8 of 16."""
    torch.manual_seed(0)
    net = Experts().double()
    rows = graph_rows(net, *batch(4, 0))
    assert rows.failure is None
    again = graph_rows(net, *batch(4, 0), known=rows.kind)
    assert again.failure is None
    assert "other uses" in str(graph_rows(net, *batch(4, 8), known=rows.kind).failure)


@pytest.mark.parametrize("tokens", [1, 4])
def test_what_was_explained_once_is_formed_row_by_row_where_it_is_not_now(tokens):
    """At the check all tokens went to the first expert; the second had no gradient."""
    torch.manual_seed(0)
    net = Experts().double()

    def kernel(x, y, checked=None):
        probes = ProbeSet(net, (lambda: evaluation(net(x), lambda f: loss_of(f, y), samples=N),), N, N)
        return tangent_kernel(probes, positions=tokens, checked=checked, generator=torch.Generator().manual_seed(0))

    x, y = batch(tokens, 0)
    checked = kernel(x, y)
    assert float(checked.gram.trace()) == pytest.approx(dense_trace(net, x, y), rel=5e-3)
    if tokens == 1:
        x = torch.cat([x[:2], -x[2:].abs()])
        x[2:, 0] = 1.0
    else:
        x, y = batch(tokens, 8)
    later = kernel(x, y, checked)
    assert float(later.gram.trace()) == pytest.approx(dense_trace(net, x, y), rel=5e-3)
    assert "rows" in later.path.values()
