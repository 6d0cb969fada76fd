"""Losses that are not one criterion of the outputs: no number instead of a calm one, and the right one where told.

Fused cross-entropy in chunks, checkpointed chunks, z-loss, and the load balancing loss of a mixture of experts.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import Model, fit
from output_row import output_row
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.functional import mean_square_lr, reduced_modes
from lsp_callbacks.operators.sgd.graph_rows import GraphRows

N, T, WIDTH, WORDS = 8, 4, 5, 6
POPULATION = 10**9


class FusedInChunks(torch.autograd.Function):
    """Last layer and cross-entropy, a few tokens at a time, with the gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx, h, weight, y):
        total, gradients = h.new_zeros(()), [torch.zeros_like(h), torch.zeros_like(weight)]
        for at in torch.arange(len(h)).split(8):
            with torch.enable_grad():
                part, w = h[at].detach().requires_grad_(), weight.detach().requires_grad_()
                loss = F.cross_entropy(part @ w.T, y[at], reduction="sum") / (y >= 0).sum()
            of_part, of_weight = torch.autograd.grad(loss, (part, w))
            gradients[0][at], total = of_part, total + loss.detach()
            gradients[1] += of_weight
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return *(g * saved for saved in ctx.saved_tensors), None


def criterion(f, batch, kind):
    loss = F.cross_entropy(f.flatten(0, 1), batch[1].flatten())
    return loss + 0.05 * f.logsumexp(-1).square().mean() if kind == "z" else loss


class Words(Model):
    def __init__(self, kind):
        super().__init__(nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        self.kind, self.head = kind, nn.Linear(WIDTH, WORDS, bias=False)
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        if kind != "experts":
            self.gate, self.experts = None, None
        with torch.no_grad():
            self.head.weight.mul_(3)

    def hidden(self, x):
        h = self.net(x)
        if self.experts is None:
            return h, 0.0
        p = self.gate(h).softmax(-1)
        most, first = p.max(-1)
        mixed = torch.where((first == 0)[..., None], self.experts[0](h), self.experts[1](h))
        share = F.one_hot(first, 2).to(p).mean((0, 1))
        return h + most[..., None] * mixed, 2 * (share * p.mean((0, 1))).sum()

    def logits(self, batch):
        return self.head(self.hidden(batch[0])[0])

    def criterion(self, f, batch):
        return criterion(f, batch, self.kind)

    def loss(self, batch):
        (h, balance), y = self.hidden(batch[0]), batch[1].flatten()
        h = h.flatten(0, 1)
        if self.kind == "fused":
            return FusedInChunks.apply(h, self.head.weight, y)
        if self.kind in ("chunks", "checkpointed chunks"):

            def part(h, y):
                return F.cross_entropy(self.head(h), y, reduction="sum")

            def kept(h, y):
                return checkpoint(part, h, y, use_reentrant=False)

            of_part = part if self.kind == "chunks" else kept
            return sum(of_part(*pair) for pair in zip(h.split(8), y.split(8))) / (y >= 0).sum()
        return self.criterion(self.logits(batch), batch) + 0.1 * balance


def batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, WORDS, (2, N, T), generator=generator)
    y[:, 0] = -100
    return DataLoader(TensorDataset(x, y), batch_size=N)


def dense_rows(model, batch):
    """The gradient of each token along the row of its own Hessian in the outputs."""
    outputs = model.logits(batch)
    f = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(N * model.criterion(f, batch), f, create_graph=True)
    rows = []
    for i, t in [(i, t) for i in range(N) for t in range(T)]:
        S = torch.stack([torch.autograd.grad(g, f, retain_graph=True)[0][i, t] for g in slope[i, t]])
        u = output_row(S, [*model.parameters()]).float()
        z = torch.autograd.grad(outputs[i, t] @ u, [*model.parameters()], retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in z]).double())
    return torch.stack(rows)


def dense_rate(model, batch):
    """The critical rate from every token."""
    z = dense_rows(model, batch)
    return mean_square_lr(reduced_modes(z @ z.T, T, tol=1e-9), batch_size=N, population=N)


@pytest.mark.parametrize("kind", ["chunks", "z", "experts"])
def test_sums_of_terms_are_right_by_themselves(kind):
    torch.manual_seed(0)
    expected = dense_rate(Words(kind), next(iter(batches())))
    monitor = StabilityMonitor(["mean_square_stability"], every_n_steps=1)
    fit(lambda: Words(kind), monitor, loader=batches(), max_steps=4)
    values = monitor.history["stability/mean_square_lr"].values
    assert values[0] == pytest.approx(expected, rel=0.1) and all(map(math.isfinite, values))
    # Experts have other tokens at each step.
    assert monitor.monitor.quantities["mean_square_stability"].needs_replay == (kind == "experts")


@pytest.mark.parametrize("kind", ["z", "chunks"])
def test_rows_of_sums_of_terms_are_those_of_every_token(kind):
    """The Gram matrix from the graph, against the gradients of each token by its own Hessian in the outputs."""
    torch.manual_seed(0)
    model, batch = Words(kind), next(iter(batches()))
    rows = GraphRows(model, torch.Generator().manual_seed(0), lambda samples: samples, lambda samples: T)
    rows.saw_loss(model.loss(batch), samples=N, factor=1.0, micro_batches=1)
    assert rows.failure is None
    rows.form({name: 1.0 for name, _ in model.named_parameters()})
    z, counted = dense_rows(model, batch), rows.chosen[0].positions
    order = [i * T + int(t) for i in range(N) for t in counted[i]]
    expected = (z @ z.T)[order][:, order]
    # Eigenvectors have no sign of their own, and are known less well where two eigenvalues are close.
    error = torch.linalg.norm(rows.gram.abs() - expected.abs()) / torch.linalg.norm(expected)
    assert error < 0.02


@pytest.mark.parametrize("kind", ["fused", "checkpointed chunks"])
def test_it_is_left_out_with_the_reason_or_right_where_the_outputs_are_told(kind):
    silent = StabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="mean_square_stability.*pass forward_fn"):
        fit(lambda: Words(kind), silent, loader=batches(), max_steps=3)
    assert not any(map(math.isfinite, silent.history.get("stability/courant_mean_square", _Nothing).values))
    assert all(map(math.isfinite, silent.history["stability/sharpness"].values))

    torch.manual_seed(0)
    expected = dense_rate(Words(kind), next(iter(batches())))
    told = StabilityMonitor(
        ["mean_square_stability"], every_n_steps=1,
        forward_fn=lambda module, batch: module.logits(batch),
        criterion=lambda f, batch: criterion(f, batch, kind),
    )  # fmt: skip
    fit(lambda: Words(kind), told, loader=batches(), max_steps=3)
    values = told.history["stability/mean_square_lr"].values
    assert values[0] == pytest.approx(expected, rel=0.1) and all(map(math.isfinite, values))


class _Nothing:
    values = ()


class Sums(Model):
    """Cross-entropy and a further term, by its kind."""

    def __init__(self, kind=None):
        super().__init__(nn.Sequential(nn.Linear(12, 24), nn.Tanh()))
        self.kind, self.head, self.other, self.router = kind, nn.Linear(24, 7), nn.Linear(24, 5), nn.Linear(24, 3)
        self.experts = nn.Parameter(torch.randn(3, 24, 24) / 5)

    def terms(self, batch):
        h = self.net(batch[0])
        routed = self.router(h)
        p = routed.softmax(-1)
        h = h + torch.tanh((p[:, :, None] * torch.einsum("bn,knm->bkm", h, self.experts)).sum(1))
        f, other = self.head(h), self.other(h)
        return F.cross_entropy(f, batch[1]), {
            None: lambda: 0.0,
            "z-loss of a router": lambda: routed.logsumexp(-1).square().mean(),
            "squares of its logits": lambda: routed.square().mean(),
            "squares of its loads": lambda: 3 * p.mean(0).square().sum(),
            "entropy of its probabilities": lambda: -(p * p.log()).sum(-1).mean(),
            "two heads": lambda: F.cross_entropy(other, batch[1] % 5),
            "a head of another loss": lambda: F.mse_loss(other, batch[0][:, :5]),
            "squares of the outputs": lambda: f.square().mean(),
            "squares of all weights": lambda: sum(w.square().sum() for w in self.parameters()),
            "squares of one weight": lambda: self.net[0].weight.square().sum(),
            "norm of a weight": lambda: self.head.weight.norm(),
            "sizes of a weight": lambda: self.net[0].weight.abs().sum(),
        }

    def loss(self, batch):
        first, others = self.terms(batch)
        return first + others[self.kind]()


KINDS = [kind for kind in Sums().terms((torch.zeros(5, 12), torch.zeros(5, dtype=torch.long)))[1] if kind]


def vectors():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 12, generator=generator), torch.randint(0, 7, (64,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_further_terms_are_never_measured_as_if_they_were_not_there(kind):
    """No headline number, with the reason; the sharpness is that of the whole loss."""
    torch.manual_seed(0)
    monitor = StabilityMonitor(["mean_square_stability", "sharpness"], every_n_steps=1)
    with pytest.warns(UserWarning, match="the value of one criterion"):
        fit(lambda: Sums(kind), monitor, loader=vectors(), max_steps=2)
    assert not any(map(math.isfinite, monitor.history.get("stability/mean_square_lr", Empty).values))
    assert all(map(math.isfinite, monitor.history["stability/sharpness"].values))


class Empty:
    values = ()


def test_a_penalty_left_out_would_be_a_calm_number():
    """What the refusal avoids: of ``CE + sum w^2`` the rows hold the curvature of the cross-entropy alone."""
    sharpness = {}
    for kind in (None, "squares of all weights"):
        monitor = StabilityMonitor(["sharpness"], every_n_steps=1)
        torch.manual_seed(0)
        fit(lambda kind=kind: Sums(kind), monitor, loader=vectors(), max_steps=1)
        sharpness[kind] = monitor.history["stability/sharpness"].values[0]
    assert sharpness["squares of all weights"] > 1.5 * sharpness[None]
