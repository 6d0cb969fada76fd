"""Momentum encoders, which a step moves before its update: replays have the values that the step began with."""

import copy
import math
import warnings

import pytest
import torch
from harness import FEATURES, SGD, Model, fit, mlp, unchanged
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import Sharpness, StabilityMonitor
from lsp_callbacks.step.moving_parameters import moved_together


class Teacher(Model):
    """Learns the outputs of an average of itself; ``at`` is the hook that moves it."""

    def __init__(self, at="training_step"):
        super().__init__(mlp(), SGD)
        self.at, self.target = at, copy.deepcopy(self.net).requires_grad_(False)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.sharpness = []

    def follow(self, at):
        if at == self.at:
            with torch.no_grad():
                for p, q in zip(self.target.parameters(), self.net.parameters()):
                    p.data = 0.9 * p.data + 0.1 * q.data  # as most codes do, not in place

    def loss(self, batch):
        x = self.frozen(batch[0])
        return F.mse_loss(self.net(x), self.target(x + 0.1 * torch.randn_like(x)) + 1)

    def training_step(self, batch, batch_idx):
        self.follow("training_step")
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.follow("on_before_zero_grad")


class Exact(Teacher):
    """Notes the sharpness of each step by its dense Hessian."""

    def loss(self, batch):
        random = torch.get_rng_state()
        with torch.random.fork_rng():
            names = [name for name, _ in self.net.named_parameters()]

            def value(*values):
                torch.set_rng_state(random)
                x = self.frozen(batch[0])
                outputs = torch.func.functional_call(self.net, dict(zip(names, values)), (x,))
                return F.mse_loss(outputs, self.target(x + 0.1 * torch.randn_like(x)) + 1)

            values = tuple(p.detach() for p in self.net.parameters())
            blocks = torch.autograd.functional.hessian(value, values)
            rows = [torch.cat([b.reshape(a.numel(), -1) for b in row], 1) for a, row in zip(values, blocks)]
            self.sharpness.append(float(torch.linalg.eigvalsh(torch.cat(rows))[-1]))
        return super().loss(batch)


@pytest.mark.parametrize("at", ["training_step", "on_before_zero_grad"])
def test_a_momentum_encoder_is_part_of_the_step(at):
    callback = StabilityMonitor([Sharpness(bounded=True)], every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fit(lambda: Exact(at), callback, max_steps=6).model
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and "frozen parameters before its update" in ours[0]
    values, bars = (callback.history[f"stability/{key}"].values for key in ("sharpness", "sharpness_residual"))
    assert math.isnan(values[0]) and len(values) == len(model.sharpness) == 6
    for value, bar, exact in zip(values[1:], bars[1:], model.sharpness[1:]):
        assert 0.98 * value <= exact <= (1 + bar) * value


@pytest.mark.parametrize("at", ["training_step", "on_before_zero_grad"])
def test_a_momentum_encoder_is_left_alone(at):
    unchanged(lambda: Teacher(at), StabilityMonitor(every_n_steps=1), max_steps=6)


def test_what_stays_frozen_is_shared():
    model = Teacher()
    first = next(model.target.parameters())
    together = moved_together(model, [first])
    assert {id(p) for p in together} == {id(p) for p in model.target.parameters()}
