"""Rows at positions (tokens) that the loss counts alone: ignored labels, padding, packed sequences; by brute force."""

import pytest
import torch
import torch.nn.functional as F
from output_row import output_row
from torch import nn

from lsp_callbacks.functional import UpdateRule, design_effect, mean_square_lr, reduced_modes
from lsp_callbacks.operators.sgd.chosen_positions import positions_of
from lsp_callbacks.operators.sgd.frozen_sgd import ENDLESS, FrozenSGD
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.probe_set import ProbeSet

N, T, WIDTH, WORDS, SEEDS = 10, 24, 4, 5, 16


class Words(nn.Module):
    """A causal transformer of one layer; ``documents`` are packed into a row, and see themselves alone."""

    def __init__(self, documents=1):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        document = torch.arange(T) * documents // T
        self.hidden = (document[:, None] != document) | torch.ones(T, T, dtype=torch.bool).triu(1)

    def forward(self, x):
        return self.head(self.block(self.table(x), src_mask=self.hidden))


def labels(kind, x):
    """``few``: one token in twelve; ``last``: one of each sample; ``answers``: the end of each, of any length."""
    places = torch.arange(T).expand_as(x)
    begin = {"last": torch.full((N, 1), T - 1), "answers": torch.randint(T // 2, T, (N, 1))}.get(kind)
    counts = torch.rand(x.shape) < 1 / 12 if begin is None else places >= begin
    counts[0, 0] = True  # the loss of none is not finite
    return torch.where(counts, torch.randint(0, WORDS, x.shape), -100)


def criterion(f, y):
    return F.cross_entropy(f.flatten(0, 1), y.flatten())


def problem(kind):
    torch.manual_seed(0)
    net = Words(4 if kind == "packed" else 1).double()
    x = torch.randint(0, WORDS, (N, T))
    return net, x, labels("few" if kind == "packed" else kind, x)


def dense(net, x, y):
    """A row for every token of every sample: its own Hessian, the row of that, and a backward pass; ``(N T, P)``."""
    outputs = net(x)
    f = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(N * criterion(f, y), f, create_graph=True)
    rows = []
    for i, t in [(i, t) for i in range(N) for t in range(T)]:
        row = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
        if y[i, t] >= 0:
            S = torch.stack([torch.autograd.grad(g, f, retain_graph=True)[0][i, t] for g in slope[i, t]])
            parameters = [*net.parameters()]
            z = torch.autograd.grad(
                outputs[i, t] @ output_row(S, parameters).to(outputs), parameters, retain_graph=True
            )
            row = torch.cat([g.flatten() for g in z])
        rows.append(row)
    return torch.stack(rows)


def from_graph(net, x, y, seed, looked):
    rows = GraphRows(net, torch.Generator().manual_seed(seed), lambda n: n, lambda n: looked)
    rows.saw_loss(criterion(net(x), y), samples=N, factor=1.0, micro_batches=1)
    rows.form(dict.fromkeys((name for name, _ in net.named_parameters()), 1.0))
    return rows.kernel(None, None)


def from_replay(net, x, y, seed, looked):
    probes = ProbeSet(net, (lambda: evaluation(net(x), lambda f: criterion(f, y), samples=N),), N, N)
    return tangent_kernel(probes, positions=looked, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        *((from_graph, kind) for kind in ("few", "last", "answers", "packed")),
        (from_replay, "few"),
        (from_replay, "answers"),
    ],
)
def test_agrees_with_every_token_by_brute_force(way, kind):
    net, x, y = problem(kind)
    rows = dense(net, x, y)
    gram = rows @ rows.T
    rate = mean_square_lr(reduced_modes(gram, T, tol=1e-10), batch_size=N, population=ENDLESS)

    whole = way(net, x, y, 0, T)  # every position, whether it counts or not
    assert float(whole.gram.trace()) == pytest.approx(float(gram.trace()), rel=5e-3)  # eigenvectors by iteration

    def rate_of(kernel):
        sgd = FrozenSGD(UpdateRule(), 0.1, N, ENDLESS, kernel, frozen=False)
        return sgd.mean_square_lr(design=kernel.design or 1.0)

    kernels = [way(net, x, y, seed, 2) for seed in range(SEEDS)]
    traces = torch.tensor([float(kernel.gram.trace()) for kernel in kernels])
    assert traces.mean() == pytest.approx(float(whole.gram.trace()), abs=float(traces.std()) * 3 / SEEDS**0.5 + 1e-6)
    ratios = torch.tensor([rate_of(kernel) for kernel in kernels]) / rate
    # Looked at without regard to what counts, most rows of the first two kinds are zero: up to 6 times the rate.
    assert 0.6 <= float(ratios.median()) <= 1.3 and float(ratios.max()) <= 2.8, ratios


def test_what_counts_comes_first():
    counts = torch.tensor([[False, True, False, True], [False, False, True, False], [True] * 4])
    for seed in range(10):
        chosen = positions_of((3, 4), 2, torch.Generator().manual_seed(seed), counts)
        assert chosen[0].tolist() == [1, 3] and 2 in chosen[1] and len({*chosen[2].tolist()}) == 2
    again = torch.Generator().manual_seed(0)
    assert positions_of((3, 4), 2, again).equal(positions_of((3, 4), 2, again.manual_seed(0), counts | True))


@pytest.mark.parametrize("looked", [2, 4])
def test_the_design_effect_is_that_of_all_positions_with_zeros_where_none_counts(looked):
    generator = torch.Generator().manual_seed(0)
    n, length = 200, 12
    counted = torch.randint(1, length + 1, (n,), generator=generator)
    z = torch.randn(n, 1, 8, generator=generator) + torch.randn(n, length, 8, generator=generator)
    z = z.double() * (torch.arange(length) < counted[:, None])[..., None]
    flat = z.flatten(0, 1)
    exact = design_effect(flat @ flat.T, length, length, samples=n)
    sampled = []
    for seed in range(5):
        counts = torch.arange(length) < counted[:, None]
        places = positions_of((n, length), looked, torch.Generator().manual_seed(seed), counts)
        some = z.gather(1, places[..., None].expand(-1, -1, 8))
        rows = some * (counted / counted.clamp(1, looked) * looked / length).sqrt()[:, None, None]
        flat = rows.flatten(0, 1)
        sampled.append(design_effect(flat @ flat.T, looked, length, samples=n, counted=counted))
    assert sum(sampled) / 5 == pytest.approx(exact, rel=0.1)
    assert 1.5 < exact < length
