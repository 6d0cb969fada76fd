"""A state that a module carries from batch to batch: probes are seen again with the state that they had."""

import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from harness import Rows, everything, fit, same
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lsp_callbacks import SGDStability, StabilityMonitor
from lsp_callbacks.step.carried_state import belongs, carried, give_back

KEYS = ("stability/courant_sgd", "stability/critical_lr", "stability/kernel_trace", "stability/kernel_rank")
WORDS, WIDTH, BATCH = 7, 5, 6


def texts(count, batch=BATCH, length=4):
    text = torch.randint(WORDS, (batch, count * length + 1), generator=torch.Generator().manual_seed(1))
    cut = [slice(k * length, (k + 1) * length) for k in range(count)]
    return [(text[:, part], text[:, 1:][:, part]) for part in cut]


class Language(pl.LightningModule):
    """Keeps its hidden state; ``where`` says how."""

    def __init__(self, cell=nn.LSTM, where="attribute"):
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH + 1, WORDS)
        self.cell = cell(WIDTH, WIDTH + 1, batch_first=True)
        self.where, self.states, self.seen = where, [], 0
        if where == "attribute":
            self.h = None
        if where == "child":
            self.cell.kept = {"h": None}

    @property
    def state(self):
        if self.where == "child":
            return self.cell.kept["h"]
        return getattr(self, "h", None)

    @state.setter
    def state(self, value):
        if self.where == "child":
            self.cell.kept = {"h": value}
        elif self.where == "in place" and getattr(self, "h", None) is not None:
            self.h = self.h.detach()
            self.h.copy_(value.detach())
        else:
            self.h = value

    def training_step(self, batch, batch_idx):
        x, y = batch[:2]
        before = batch[2] if len(batch) > 2 else self.state
        if isinstance(before, torch.Tensor):
            before = before.detach().clone()
        elif before is not None:
            before = tuple(t.detach() for t in before)
        outputs, after = self.cell(self.embed(x), before)
        if len(batch) == 2:
            self.state = after
        return F.cross_entropy(self.out(outputs).flatten(0, 1), y.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def memory(self):
        return None


class States(pl.Callback):
    """The state before each batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = pl_module.state
        self.states.append(state.clone() if pl_module.where == "in place" and state is not None else state)


def measure(make, loader, probes=18, **settings):
    monitor, states = StabilityMonitor([SGDStability(probes=probes)], every_n_steps=1), States()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lsp_callbacks")
        fit(make, monitor, states, loader=DataLoader(loader, batch_size=None), max_steps=len(loader), **settings)
    return monitor.history, states.states


def zeros(cell, batch):
    h = torch.zeros(1, batch, WIDTH + 1)
    return (h, h.clone()) if cell is nn.LSTM else h


@pytest.mark.parametrize(
    "where, cell, probes",
    [
        ("attribute", nn.LSTM, 18), ("absent", nn.GRU, 18), ("child", nn.LSTM, 18), ("in place", nn.GRU, 18),
        ("attribute", nn.GRU, 6), ("absent", nn.LSTM, 6), ("child", nn.GRU, 3),
    ],
)  # fmt: skip
def test_a_twin_that_gets_the_state_with_its_batches_says_the_same(where, cell, probes):
    """With as many probes as a batch or fewer, the state that the module has by now would fit in shape."""
    loader = texts(6)
    ours, states = measure(lambda: Language(cell, where), loader, probes)
    given = [(x, y, zeros(cell, BATCH) if h is None else h) for (x, y), h in zip(loader, states)]
    moved = lambda h: tuple(t.detach() for t in h) if isinstance(h, tuple) else h.detach()  # noqa: E731
    twin, _ = measure(lambda: Language(cell), [(x, y, moved(h)) for x, y, h in given], probes if probes > 3 else 6)
    for key in KEYS:
        assert ours[key].steps == twin[key].steps and len(ours[key].steps) >= 4
        if probes > 3:
            assert ours[key].values == pytest.approx(twin[key].values, rel=1e-2), key
        assert all(map(math.isfinite, ours[key].values))


def test_training_is_left_as_it_was():
    left = []
    for ours in ([], [StabilityMonitor(every_n_steps=2)]):
        rows = Rows()
        run = fit(Language, *ours, loader=DataLoader(texts(12), batch_size=None), logger=rows, max_steps=12)

        class Nothing:
            losses = None

        left.append(everything(run, run.lightning_module, Nothing, rows))
    assert same(*left)


def test_a_state_that_does_not_fit_is_named():
    class Strict(Language):
        def training_step(self, batch, batch_idx):
            if self.h is not None and type(self.trainer).__name__ != "Trainer" and not self.training:
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    monitor = StabilityMonitor("sgd_stability", every_n_steps=1)
    with pytest.warns(UserWarning, match="h, which the module carries from batch to batch.*forward_fn"):
        fit(Strict, monitor, loader=DataLoader(texts(24), batch_size=None), max_steps=24)
    assert monitor.history and all(math.isnan(v) for key in KEYS[:2] for v in monitor.history[key].values)


def test_what_a_metric_collects_is_no_state():
    """It holds an entry for each sample, and has no say in the loss: probes are one batch, and of any process."""
    net = nn.Linear(2, 2)
    net.auroc = torchmetrics.AUROC(task="binary")
    net.auroc.update(torch.rand(6), torch.tensor([0, 1] * 3))
    assert not belongs(carried(net), 6)


def test_what_is_no_state_of_the_samples_is_left_alone():
    net = nn.BatchNorm1d(6)
    net.table, net.none, net.scale = torch.arange(4.0), None, torch.ones(())
    state = carried(net)
    assert not belongs(state, 6) and set(state) == {("", "table"), ("", "none"), ("", "scale")}
    net.table, net.none, net.scale = torch.zeros(4), torch.zeros(3), torch.zeros(())
    assert give_back(net, state, 6) == [] and not net.table.any()
    net.none = torch.zeros(2, 6)
    assert give_back(net, state, 6) == ["none"] and net.none is None
