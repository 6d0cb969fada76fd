"""A step is not replayed for its graph alone where it looks like those before; what is wrong is found all the same."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Sharpness, SpectralNorm, StabilityMonitor
from lsp_callbacks.autograd.graph import Graph
from lsp_callbacks.step import replay_checks
from lsp_callbacks.step.replay_checks import PASSED, SELDOM, KnownGraph

STEPS = 30
KEY = "stability/sharpness"


class Task(pl.LightningModule):
    """A network whose loss depends on something outside of it, from a step on; or that gets a kink."""

    def __init__(self, activation, impure_from=math.inf, kinked_from=math.inf, change=1e-3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 3))
        self.impure_from, self.kinked_from, self.change = impure_from, kinked_from, change

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        if self.global_step >= self.kinked_from:
            outputs = outputs.relu() - (-outputs).relu()  # the same numbers
        loss = nn.functional.cross_entropy(outputs, batch[1])
        if self.global_step >= self.impure_from:
            CALLS.append(1)
            loss = loss * (1 + self.change * len(CALLS))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


CALLS = []


@pytest.fixture
def replays(monkeypatch):
    """The steps that were replayed for their graph."""
    steps, verify = [], replay_checks._verify
    monkeypatch.setattr(replay_checks, "_verify", lambda snapshot: steps.append(snapshot.step) or verify(snapshot))
    return steps


def trained(task, method="auto", quantity=None):
    torch.manual_seed(0)
    CALLS.clear()
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    monitor = StabilityMonitor([quantity or Sharpness(method=method)], every_n_steps=1)
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[monitor], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, DataLoader(data, batch_size=16))
    return monitor


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_step_is_seldom_replayed_for_its_graph(activation, replays):
    monitor = trained(Task(activation))
    values = monitor.history[KEY].values
    assert len(values) == STEPS and all(map(math.isfinite, values))
    assert replays == [step for step in range(STEPS) if step < PASSED or (step - PASSED) % (SELDOM + 1) == SELDOM]


@pytest.mark.filterwarnings("ignore:lsp_callbacks could not measure")
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("change", [1e-3, 1.0])
def test_a_step_that_begins_to_depend_on_something_outside_is_not_measured(activation, change, replays):
    begin = PASSED + 2  # a step that is not replayed for its graph
    values = trained(Task(activation, impure_from=begin, change=change)).history[KEY].values
    assert all(map(math.isfinite, values[:begin])) and all(map(math.isnan, values[begin:]))
    assert begin not in replays


def test_a_loss_that_gets_a_kink_is_replayed_at_once(replays):
    begin = PASSED + 2
    monitor = trained(Task(nn.Tanh, kinked_from=begin))
    assert begin in replays and begin - 1 not in replays
    assert monitor.paths["sharpness"] == "finite difference, slopes held" and all(
        map(math.isfinite, monitor.history[KEY].values)
    )


SMOOTH = Graph(kinks=(), fused=False, dtype=torch.float32, custom=())
KINKED = Graph(kinks=("ReluBackward0",), fused=False, dtype=torch.float32, custom=())


def test_what_is_known_is_used_seldom_and_forgotten_with_a_failure():
    known = KnownGraph()
    for _ in range(PASSED):
        assert known.expected(SMOOTH) is None
        known.verified(SMOOTH, KINKED)  # a checkpoint hides the kink
    assert known.expected(None) is None and known.expected(KINKED) is None
    assert [known.expected(SMOOTH) for _ in range(SELDOM + 1)] == [KINKED] * SELDOM + [None]
    known.verified(SMOOTH, KINKED)
    assert known.expected(SMOOTH) is KINKED
    known.failed()
    assert known.expected(SMOOTH) is None


def test_another_graph_begins_anew():
    known = KnownGraph()
    for _ in range(PASSED):
        known.verified(SMOOTH, SMOOTH)
    known.verified(KINKED, KINKED)
    assert known.expected(KINKED) is None and known.expected(SMOOTH) is None


@pytest.mark.filterwarnings("ignore:lsp_callbacks could not measure")
@pytest.mark.parametrize("impure_from", [math.inf, PASSED + 2])
def test_a_replay_that_is_compared_by_its_loss_is_seldom_looked_at_for_more(monkeypatch, impure_from):
    """Norms of layers replay each step for the sizes of their inputs: its loss is checked every time."""
    watched = []
    begin = replay_checks.StopGradients.__enter__
    monkeypatch.setattr(replay_checks.StopGradients, "__enter__", lambda self: watched.append(1) or begin(self))
    monitor = trained(Task(nn.Tanh, impure_from=impure_from), quantity=SpectralNorm())
    values = monitor.history["stability/spectral_norm_max"].values
    right = min(impure_from, STEPS)
    assert all(map(math.isfinite, values[:right])) and all(map(math.isnan, values[right:]))
    if right == STEPS:
        assert len(watched) == sum(step < PASSED or (step - PASSED) % (SELDOM + 1) == SELDOM for step in range(STEPS))
