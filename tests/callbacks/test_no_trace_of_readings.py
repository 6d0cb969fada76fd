"""The headline number is read from the step's own graph, and training does not notice."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import CLASSES, FEATURES, SGD, Model, convolutional, data, encoder, fit, mlp, tied, unchanged, wrapped
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lsp_callbacks import MeanSquareStability, StabilityMonitor
from lsp_callbacks.step.module_copy import ModuleCopy

STEPS = 12
#: Readings 1, 32, 1024, ... are checked against a replay.
CHECKED = 1


class Counting(Model):
    """Counts the calls of its user's hooks on gradients; they are called as often as in training alone."""

    def __init__(self, kind):
        super().__init__(mlp(nn.ReLU(inplace=kind == "tensor")))
        self.kind, self.calls = kind, 0
        if kind == "module":
            self.net[0].register_full_backward_hook(self.seen)

    def seen(self, *args):
        self.calls += 1

    def loss(self, batch):
        x, y = batch
        h = self.net[0](x)
        if self.kind == "tensor" and h.requires_grad:
            h.register_hook(self.seen)
        if self.kind == "node" and h.requires_grad:
            h.grad_fn.register_prehook(self.seen)
        if self.kind == "function":
            h = Noted.apply(h, self)
        return F.cross_entropy(self.net[1:](h), y)

    def memory(self):
        return self.calls


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.model.calls += 1
        return g, None


class Checkpointed(Model):
    def __init__(self, reentrant):
        super().__init__(mlp(nn.Linear(5, 5)))
        self.reentrant, self.calls = reentrant, 0

    def again(self, h):
        self.calls += 1
        return self.net[1:3](h)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net[3:](checkpoint(self.again, self.net[0](x), use_reentrant=self.reentrant)), y)

    def memory(self):
        return self.calls


class Gpt(Model):
    def __init__(self, optimizer=SGD, **dropout):
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=FEATURES, bos_token_id=0, eos_token_id=0,
            **dropout,
        )  # fmt: skip
        super().__init__(transformers.GPT2LMHeadModel(config), optimizer)

    def loss(self, batch):
        tokens = (batch[0].abs() * 4).long().clamp_max(10)
        return self.net(input_ids=tokens, labels=tokens).loss


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    net = encoder()
    net.recurrent = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return Model(net)


def images(norm):
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


#: Whether the readings come from the step's own graph; otherwise from a replay, as a second backward pass would be
#: noticed, or is not that of the measured network.
CASES = {
    "mlp": (Model, {}, True),
    "in place": (lambda: Model(mlp(nn.ReLU(inplace=True))), {}, True),
    "images": (lambda: Model(images(partial(nn.GroupNorm, 2))), {}, True),
    "batch norm": (lambda: Model(convolutional()), {}, True),
    "batch norm on images": (lambda: Model(images(nn.BatchNorm2d)), {}, True),
    "attention": (attention, {}, True),
    "tied": (partial(Gpt, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), {}, True),
    "dropout in a transformer": (Gpt, {}, True),
    "accumulated": (lambda: Model(), {"accumulate_grad_batches": 2, "max_steps": STEPS}, True),
    "clipped": (lambda: Model(), {"gradient_clip_val": 0.1}, True),
    "bfloat16": (lambda: Model(mlp(width=32)), {"precision": "bf16-mixed"}, True),
    "tensor hook": (lambda: Counting("tensor"), {}, True),
    "node hook": (lambda: Counting("node"), {}, True),
    "module hook": (lambda: Counting("module"), {}, False),
    "function": (lambda: Counting("function"), {}, False),
    "dropout": (lambda: Model(mlp(nn.Dropout(0.3))), {}, True),
    "checkpoint": (lambda: Checkpointed(False), {}, False),
    "reentrant checkpoint": (lambda: Checkpointed(True), {}, False),
    "weight norm": (lambda: wrapped(parametrizations.weight_norm), {}, False),
    "shared weight": (tied, {}, True),
    "preconditioner": (lambda: Model(optimizer=partial(torch.optim.AdamW, lr=1e-3)), {}, True),
}


@pytest.fixture
def copies(monkeypatch):
    made = []
    original = ModuleCopy.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(ModuleCopy, "__init__", counted)
    return made


def chosen(*quick):
    """All cases, of which these run by default."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize(
    "name",
    chosen(
        "dropout",
        "dropout in a transformer",
        "in place",
        "batch norm",
        "accumulated",
        "tensor hook",
        "module hook",
        "function",
        "checkpoint",
    ),
)
def test_readings_leave_no_trace(name, copies):
    make, settings, from_graph = CASES[name]
    monitor = StabilityMonitor([MeanSquareStability()], every_n_steps=1, strict=True)
    unchanged(make, monitor, **{"max_steps": STEPS} | settings)
    readings = monitor.history["stability/courant_mean_square"]
    assert len(readings.steps) >= STEPS - 1 and all(map(math.isfinite, readings.values))
    # The first step of a preconditioner is left out, which is known only once it was kept.
    assert len(copies) == (CHECKED + (name == "preconditioner") if from_graph else STEPS)


def readings(make, *, from_graph, monkeypatch, **settings):
    with monkeypatch.context() as patch:
        if not from_graph:
            patch.setattr(MeanSquareStability, "reader", lambda *args: None)
        monitor = StabilityMonitor([MeanSquareStability()], every_n_steps=1, strict=True)
        fit(make, monitor, loader=data(64, 16), **{"max_steps": STEPS} | settings)
    return monitor.history["stability/courant_mean_square"].values


@pytest.mark.parametrize("name", chosen("mlp", "batch norm", "attention", "preconditioner"))
def test_a_reading_from_the_graph_is_that_of_the_replay(name, monkeypatch):
    if name.startswith("dropout"):
        pytest.skip("rows of samples are without masks: see test_graph_rows.py")
    # Where samples have many positions, those of earlier steps stand in for some: here all are of the step itself.
    monkeypatch.setattr("lsp_callbacks.quantities.sgd.mean_square_stability.COMPARED", 1)
    make, settings, _ = CASES[name]
    values = {kind: readings(make, from_graph=kind, monkeypatch=monkeypatch, **settings) for kind in (True, False)}
    tolerance = 5e-2 if name == "bfloat16" else 1e-3
    assert values[True] == pytest.approx(values[False], rel=tolerance)


class Changing(Model):
    """What it computes, or what is trained, changes after some steps."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch, index):
        x, y = batch
        if self.global_step < STEPS // 2:
            return super().training_step(batch, index)
        if self.what == "parameters":
            self.net[0].requires_grad_(False)
        elif self.what == "nodes":
            x = 2 * self.net(x).tanh()
            return torch.nn.functional.cross_entropy(x, y)
        return super().training_step(batch, index)


@pytest.mark.parametrize("what", ["nothing", "parameters", "nodes"])
def test_a_changed_graph_is_checked_anew(what, copies, monkeypatch):
    monitor = StabilityMonitor([MeanSquareStability()], every_n_steps=1, strict=True)
    fit(lambda: Changing(what), monitor, loader=data(64, 16), max_steps=STEPS)
    assert len(copies) == CHECKED + (what != "nothing")
    found = monitor.history["stability/courant_mean_square"]
    expected = readings(lambda: Changing(what), from_graph=False, monkeypatch=monkeypatch)
    assert len(found.steps) == STEPS - (what != "nothing")  # a reading waits for a step that was kept
    assert found.values == pytest.approx([expected[step] for step in found.steps], rel=1e-3)
