"""What the model of the cost counts in a replay, and that calls weigh on small networks only."""

from dataclasses import replace

import pytest
import torch
from problems import freeze
from torch import nn
from torch.optim import SGD

from lsp_callbacks import Snapshot
from lsp_callbacks.operators.cost import (
    Work,
    WorkCounter,
    beside,
    gradient_time,
    lanczos_cost,
    products,
    sample_passes,
    work,
)
from lsp_callbacks.operators.curvature.hessian import product_cost
from lsp_callbacks.operators.sgd.gram_matrix import TangentKernel
from lsp_callbacks.quantities.sgd.probe_cost import ALONE, gram_cost, kernel_cost
from lsp_callbacks.step.probe_set import ProbeSet


class Net(nn.Module):
    """What no hook of a module sees is counted, too."""

    def __init__(self, width=8, batch=16):
        super().__init__()
        self.embed, self.first, self.free = nn.Embedding(50, 3), nn.Linear(3, width), nn.Parameter(torch.ones(width, 2))
        self.register_buffer("x", torch.arange(batch) % 50)

    def forward(self):
        return (torch.tanh(self.first(self.embed(self.x))) @ self.free).square().mean()


def frozen(width=8, batch=16):
    torch.manual_seed(0)
    net = Net(width, batch)
    return freeze(net, SGD(net.parameters(), lr=0.1))


def test_multiplications_are_those_of_the_matrices():
    """16 (3 * 8 + 8 * 2); the embedding multiplies nothing. Numbers: (16, 3), (16, 8) twice, (16, 2) twice, 1."""
    found = work(frozen())
    assert found == Work(found.calls, 48 + 2 * 128 + 2 * 32 + 1, 16 * 40.0, 150 + 24 + 8 + 16)
    assert 6 <= found.calls <= 10


def test_convolution_and_attention():
    """A 3 x 3 kernel at each of 25 places; two matrices of 4 x 4 scores for 2 heads, and four projections."""
    conv, x = nn.Conv2d(2, 4, 3, padding=1, bias=False), torch.ones(3, 2, 5, 5)
    assert work(Snapshot(0, conv, lambda: conv(x).sum())).multiplications == 3 * 25 * 4 * 18
    attention, y = nn.MultiheadAttention(6, 2, batch_first=True), torch.ones(5, 4, 6)
    found = work(Snapshot(0, attention, lambda: attention(y, y, y)[0].sum()))
    assert found.multiplications == 5 * (4 * 4 * 6 * 6 + 2 * 4 * 4 * 6)


def test_counting_is_the_same_each_time_and_leaves_no_trace():
    dropout = nn.Sequential(nn.Linear(4, 4), nn.Dropout())

    def loss():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return dropout(torch.ones(2, 4)).sum()

    before = torch.get_rng_state()
    found = [work(Snapshot(0, dropout, loss)) for _ in range(2)]
    assert found[0] == found[1] and torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in dropout.parameters())


def test_calls_weigh_on_small_networks_only():
    small, large = frozen(), frozen(width=4096, batch=4096)
    for method in ("exact", "finite_difference"):
        passes = product_cost(method, 4)
        assert products(small, method, 4) > 1.2 * passes
        assert passes < products(large, method, 4) < lanczos_cost(large, method, 4) < 1.1 * passes
        assert products(small, method, 4, tangent=True) > products(small, method, 4)
    assert beside(small, calls=10) == pytest.approx(10 * beside(small, calls=1)) and gradient_time(large) > 100 * 3e5
    assert lanczos_cost(small, "exact", 20) - products(small, "exact", 20) > 2 * (
        lanczos_cost(small, "exact", 10) - products(small, "exact", 10)
    )


def test_a_pass_of_few_samples():
    """All of them are a gradient; of one, what is left are the calls."""
    snapshot = frozen(width=4096, batch=4096)
    assert sample_passes(snapshot, 4096, 3) == sample_passes(snapshot, 5000, 3) == pytest.approx(3)
    one, two = (sample_passes(snapshot, n, 1) for n in (1, 2049))
    assert one < 0.02 and two == pytest.approx(0.5, abs=0.02)


def test_a_replay_that_fails_says_so():
    snapshot = frozen()

    def fails():
        raise ValueError("no second time")

    with pytest.raises(ValueError, match="no second time"):
        work(replace(snapshot, replay=fails))


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_multiplications_of_recurrent_layers_are_those_of_their_matrices(kind, gates):
    """Of 5 places of 3 samples, also where one operator runs the whole layer."""
    with WorkCounter() as counter:
        kind(6, 8, 2, batch_first=True)(torch.ones(3, 5, 6))
    assert counter.flops == 2 * 15 * gates * (6 * 8 + 3 * 8 * 8)


@pytest.mark.parametrize("hidden, times", [(32, 1), (512, 4)])
def test_layers_that_run_on_one_sample_at_a_time_are_paid_for(hidden, times):
    """Where their gradients cannot be held, each of four parameters needs them anew."""
    net = nn.Sequential(nn.LSTM(32, hidden, batch_first=True))
    step = freeze(net, SGD(net.parameters(), lr=0.1), replay=lambda: net(torch.ones(16, 2, 32))[0].square().mean())
    assert gram_cost(step, 64, 16) > ALONE * 64 / 16 * times
    assert gram_cost(step, 64, 16) < ALONE * 64 / 16 * (times + 3)


@pytest.mark.parametrize("path, alone", [("layer", True), ("rows", False)])
def test_they_are_paid_for_once_also_where_a_matrix_was_measured(path, alone):
    """The layers are known from how an earlier matrix was computed; what shapes said before it, is no other price."""
    net = nn.Sequential(nn.LSTM(32, 32, batch_first=True))
    step = freeze(net, SGD(net.parameters(), lr=0.1), replay=lambda: net(torch.ones(16, 2, 32))[0].square().mean())
    probes = ProbeSet(net, (), 64, 16, 64)
    before = TangentKernel(torch.eye(64), 1, dict.fromkeys(step.parameters, path), {})
    first, later = (kernel_cost(step, probes, 64, kernel)["kernel"] for kernel in (None, before))
    assert first == pytest.approx(later + (0 if alone else ALONE * 64 / 16))
