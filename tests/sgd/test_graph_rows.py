"""Rows of the Gram matrix from a graph that is differentiated afterwards, against the dense Jacobian of each sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsp_callbacks.operators.sgd import graph_row_rules, layer_rules
from lsp_callbacks.operators.sgd.graph_norms import BatchNormSite
from lsp_callbacks.operators.sgd.graph_rows import GraphRows

N = 6


def cross_entropy(f, y):
    return F.cross_entropy(f.flatten(0, -2), y.flatten())


def smoothed(f, y):
    return F.cross_entropy(f, y, label_smoothing=0.1)


def mixed(f, y):
    return F.cross_entropy(f, F.one_hot(y, 4).to(f) * 0.7 + 0.3 / 4)


def squares(f, y):
    return F.mse_loss(f, y.to(f)[:, None])


def logistic(f, y):
    return F.binary_cross_entropy_with_logits(f.squeeze(1), (y % 2).to(f))


class Tokens(nn.Module):
    """Samples second in attention, positions shared by all samples, a table that is the last layer, too."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.table, self.place = nn.Embedding(4, 6), nn.Parameter(torch.randn(1, 7, 6))
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=dropout, batch_first=True)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        h = self.block(self.table(x) + self.place[:, : x.shape[1]]) * self.scale
        return F.linear(h, self.table.weight)


def images():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (2, 1), groups=2, bias=False), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip


def mlp(outputs=4):
    return nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 5, bias=False), nn.Tanh(),
        nn.Linear(5, outputs),
    )  # fmt: skip


def norms_of_vectors():
    return nn.Sequential(
        nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.Linear(6, 5), nn.BatchNorm1d(5).eval(), nn.ReLU(), nn.Linear(5, 4)
    )


CASES = {
    "norms of vectors": (norms_of_vectors, (3,), cross_entropy),
    "mlp": (mlp, (3,), cross_entropy),
    "smoothed": (mlp, (3,), smoothed),
    "mixed": (mlp, (3,), mixed),
    "squares": (lambda: mlp(1), (3,), squares),
    "logistic": (lambda: mlp(1), (3,), logistic),
    "images": (images, (2, 7, 7), cross_entropy),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 4)),
        (3,),
        cross_entropy,
    ),
    "tokens with dropout": (lambda: Tokens(0.3), None, cross_entropy),
    "tokens": (Tokens, None, cross_entropy),
    "as many tokens as samples": (Tokens, None, cross_entropy),
}


def dense(net, x, y, criterion, chosen, scale):
    """The same rows by brute force: the Hessian of the loss in the outputs, its eigenpair, and a backward pass each."""
    torch.manual_seed(1)  # of dropout
    outputs, parameters = net(x), [*net.parameters()]
    f = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(N * criterion(f, y), f, create_graph=True)
    flat, grad = outputs.reshape(N, -1, outputs.shape[-1]), slope.reshape(N, -1, outputs.shape[-1])
    root = torch.cat([(scale[name] ** 0.5).reshape(-1) for name, _ in net.named_parameters()])
    rows = []
    for i, chance in zip(chosen.taken.tolist(), chosen.chance.tolist()):
        for position in chosen.positions[i].tolist():
            S = torch.stack(
                [torch.autograd.grad(g, f, retain_graph=True)[0].view_as(flat)[i, position] for g in grad[i, position]]
            )
            values, vectors = torch.linalg.eigh(S)
            z = torch.autograd.grad(flat[i, position] @ vectors[:, -1], parameters, retain_graph=True)
            weight = flat.shape[1] / chosen.positions.shape[1] / chance
            rows.append((weight * values[-1]) ** 0.5 * root * torch.cat([g.reshape(-1) for g in z]))
    z = torch.stack(rows)
    return z @ z.T


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_dense_jacobian(name, some):
    make, shape, criterion = CASES[name]
    torch.manual_seed(0)
    net = make().double()
    length = N if name.startswith("as many") else 5
    x = torch.randint(0, 4, (N, length)) if shape is None else torch.randn(N, *shape, dtype=torch.float64)
    y = torch.randint(0, 4, (N, length) if shape is None else (N,))
    with torch.no_grad():
        for p in net.parameters():  # outputs that are apart: eigenvectors are then clear
            p.mul_(2.0)
    scale = {name: 0.5 + torch.rand_like(p) for name, p in net.named_parameters()}
    rows = GraphRows(net, torch.Generator().manual_seed(0), lambda n: n // 2 if some else n, lambda n: 2)
    torch.manual_seed(1)
    loss = criterion(net(x), y)
    rows.saw_loss(loss / 8, samples=N, factor=1 / 8, micro_batches=1)
    assert rows.failure is None
    expected = dense(net, x, y, criterion, rows.chosen[0], scale)
    rows.form(scale)
    found = rows.kernel(None, None).gram
    assert len(found) == len(expected) >= (3 if some else N)
    sizes = expected.diagonal().sqrt()
    signs = (found * expected).sign()  # of eigenvectors
    assert (found - signs * expected).abs().amax() <= 2e-3 * sizes.amax() ** 2
    assert torch.allclose(found.diagonal(), expected.diagonal(), rtol=2e-3)
    loss.backward()  # the graph is whole


def test_a_batch_norm_of_vectors_is_that_of_one_pixel():
    torch.manual_seed(0)
    x, y = torch.randn(N, 3), torch.randint(0, 4, (N,))
    of_vectors = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    of_pixels = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5, 4))
    for p, q in zip(of_vectors.parameters(), of_pixels.parameters()):
        p.data.mul_(2.0)  # outputs that are apart: eigenvectors are then clear
        q.data.copy_(p.view_as(q))

    def gram(net, x):
        rows = GraphRows(net, torch.Generator().manual_seed(0), lambda n: n, lambda n: 1)
        rows.saw_loss(F.cross_entropy(net(x), y), samples=N, factor=1.0, micro_batches=1)
        assert rows.failure is None
        rows.form({name: torch.ones_like(p) for name, p in net.named_parameters()})
        return rows.kernel(None, None).gram.abs()

    assert torch.allclose(gram(of_vectors, x), gram(of_pixels, x[..., None, None]), rtol=1e-3, atol=1e-4)


def read_twice(net, x, y, some=()):
    """What a first reading learns, and the Gram matrices of a second one, by rows and by all samples."""
    names = [name for name, _ in net.named_parameters()]
    scale = dict.fromkeys(names, 0.0) | dict.fromkeys(some or names, 1.0)

    def read(known):
        rows = GraphRows(net, torch.Generator().manual_seed(0), lambda n: n // 2, lambda n: 1, known=known)
        rows.saw_loss(F.cross_entropy(net(x), y), samples=len(x), factor=1.0, micro_batches=1)
        assert rows.failure is None
        rows.form(scale)
        return rows

    kind = read(None).kind
    return kind, read(kind).gram, read(kind._replace(by_rows=False)).gram


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return F.relu(x + self.body(x))


PLAIN = {
    "mlp": lambda: [nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4)],
    "cnn": lambda: [
        nn.Conv2d(2, 4, 3, padding=1), Block(), nn.GELU(), nn.MaxPool2d(2), nn.SiLU(), nn.Conv2d(4, 5, 2),
        nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_of_the_samples_that_have_rows_are_taken_back_alone(name, monkeypatch):
    torch.manual_seed(0)
    net, x, y = nn.Sequential(*PLAIN[name]()).double(), torch.randn(8, 2, 6, 6).double(), torch.randint(0, 4, (8,))
    kind, alone, together = read_twice(net, x, y)
    assert kind.by_rows and len(alone) == 4 and torch.allclose(alone, together, rtol=1e-9)
    last = "TanhBackward0" if name == "mlp" else "SigmoidBackward0"
    monkeypatch.setitem(graph_row_rules.ROW_RULES, last, lambda node, g, pick: (g,))
    assert not read_twice(net, x, y)[0].by_rows  # a rule that is wrong, or that is not there
    monkeypatch.delitem(graph_row_rules.ROW_RULES, last)
    assert not read_twice(net, x, y)[0].by_rows


def test_some_samples_show_how_inputs_and_outputs_of_a_convolution_go_together(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 4))
    x, y = torch.randn(32, 2, 16, 16), torch.randint(0, 4, (32,))
    shares = []
    for step in (1, 4):
        monkeypatch.setattr(layer_rules, "SPARSE", step)
        shares.append(read_twice(net, x, y, ["0.weight"])[1])
    assert 0 < (shares[1] - shares[0]).norm() < 0.02 * shares[0].norm()


class Twice(nn.Module):
    """Takes the outputs of a convolution beside their normalisation, too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.alone = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), True
        self.last = nn.Linear(144, 4)

    def forward(self, x):
        h = self.first(x)
        return self.last(F.relu(self.norm(h) if self.alone else self.norm(h) + h).flatten(1))


@pytest.mark.parametrize("is_only", [True, False])
def test_sums_ahead_of_a_normalisation_are_those_behind_it_where_nothing_else_takes_its_input(monkeypatch, is_only):
    torch.manual_seed(0)
    net, x, y = Twice(), torch.randn(12, 2, 8, 8), torch.randint(0, 4, (12,))
    net.alone = is_only
    with torch.no_grad():
        net.norm.weight.uniform_(-1, 2)
    known = read_twice(net, x, y, ["first.weight"])[1]
    sites = []
    uses = BatchNormSite.uses

    def without(site, g, samples):
        sites.append(site.is_only)
        site.is_only = False
        return uses(site, g, samples)

    monkeypatch.setattr(BatchNormSite, "uses", without)
    gram = read_twice(net, x, y, ["first.weight"])[1]
    assert known.norm() > 0 and (gram - known).norm() < 1e-5 * known.norm()
    assert {*sites} == {is_only}
